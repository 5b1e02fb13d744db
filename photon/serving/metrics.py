"""What Prometheus reads of the server. No label holds anything of a request's content."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)


class Metrics:
    """Counters of one server.

    Args: backend: whose queue is measured; store: `ScanStore`, or `None` where workers hold the scans.
    """

    def __init__(self, backend, store):
        self.registry = CollectorRegistry()
        name = {"registry": self.registry, "namespace": "photon"}
        self.requests = Counter("requests", "Requests by route and status", ["route", "status"], **name)
        self.seconds = Histogram("answer_seconds", "Seconds from request to whole answer", buckets=SECONDS, **name)
        self.first = Histogram("first_token_seconds", "Seconds of the prompt in the model", buckets=SECONDS, **name)
        self.kept = Histogram("kept_share", "Share of visual tokens kept", buckets=SHARES, **name)
        self.batch = Histogram("batch_size", "Questions answered together", buckets=(1, 2, 4, 8, 16, 32), **name)
        self.tokens = Counter("answer_tokens", "Tokens written", **name)
        self.hung_up = Counter("hung_up", "Clients that left before their answer", **name)
        Gauge("waiting", "Questions that wait", **name).set_function(lambda: backend.queue_length)
        if store is not None:
            Gauge("scans", "Scans held", **name).set_function(lambda: len(store.held))
            Gauge("scan_bytes", "Bytes of the scans held", **name).set_function(lambda: store.nbytes)
            Gauge("scan_hits", "Scans found encoded", **name).set_function(lambda: store.hits)

    def answered(self, answer, seconds):
        """Counts an `Answer` and its seconds."""
        self.seconds.observe(seconds)
        self.first.observe(answer.seconds["first_token"])
        self.kept.observe(answer.tokens_kept / max(1, answer.tokens_seen))
        self.batch.observe(answer.batch)
        self.tokens.inc(answer.answer_tokens)

    def text(self):
        """All of it in Prometheus' format (bytes)."""
        return generate_latest(self.registry)
