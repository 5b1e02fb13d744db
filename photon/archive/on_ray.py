"""An audit on the nodes of a Ray cluster: each node reads shards with its worker processes. Needs ray[data].

All nodes must see the scans and the cache under the same paths.
"""

from functools import partial

from photon.archive.audit import Audit
from photon.loading import ROOT

SHARDS_PER_NODE = 4  # so that a fast node takes more of them


def run_on_ray(audit, address, workers, timeout):
    """Yields an id after another, as shards end. address: of the cluster, "auto", or "local" for a new one.

    Args: workers: processes on each node, at most its cores.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError('--ray needs Ray, which is missing: pip install "ray[data]"') from error
    if not ray.is_initialized():
        environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        ray.init(address=None if address == "local" else address, log_to_driver=False, runtime_env=environment)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    number = SHARDS_PER_NODE * len(nodes)
    workers = min(workers, *(int(node["Resources"].get("CPU", 1)) for node in nodes))
    read = partial(_read_shard, audit.scans, audit.settings, str(audit.cache_dir), number, workers, timeout)
    shards = ray.data.from_items([{"shard": i} for i in range(1, number + 1)], override_num_blocks=number)
    for row in shards.map(read, num_cpus=workers).iter_rows():
        yield from row["ids"]


def _read_shard(scans, settings, cache_dir, number, workers, timeout, row):
    """Reads one shard on the node where it runs; its records are written there, into the cache that all share."""
    audit = Audit(scans, settings, cache_dir, (int(row["shard"]), number))
    return {"ids": [record["id"] for record in audit.run(workers, timeout)]}
