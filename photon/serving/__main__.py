"""Starts the server: questions about scans over the OpenAI API.

    PHOTON_TOKENS=$(openssl rand -hex 32) python -m photon.serving [--model DIR] [--port 8000] [--folder SCANS]

Only this machine reaches the server unless --host says otherwise, and nobody without a token: those in the variable
PHOTON_TOKENS (several with commas), or one that is made and printed at the start. Uploads are read into memory and
deleted from the disk at once; each is reached with its own token alone. Not a medical device.
"""

import argparse
import os


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: this repository's tiny model)")
    parser.add_argument("--name", default="photon", help="the model's name in the API (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--folder", metavar="DIR", help="scans below it may be named by path in a request")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights; auto: the checkpoint's on a GPU, else by size, processor and free memory",
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes behind Ray Serve, one a GPU; 0: this process"
    )
    parser.add_argument("--max-batch", type=int, default=16, help="questions answered together")
    parser.add_argument("--max-waiting", type=int, default=64, help="questions that may wait; others get 429")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for an answer, with waiting")
    parser.add_argument("--max-upload", type=int, default=1024, metavar="MIB", help="largest upload")
    parser.add_argument("--max-scans", type=int, default=4096, metavar="MIB", help="memory for encoded scans")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    import torch
    import uvicorn

    from photon.console import one_line_faults
    from photon.loading import ROOT, load, load_processor
    from photon.serving.access import Tokens
    from photon.serving.backend import LocalBackend
    from photon.serving.engine import Engine
    from photon.serving.files import ScanStore
    from photon.serving.incoming import Limits
    from photon.serving.server import build_server

    with one_line_faults():
        tokens = Tokens([token for token in os.environ.get("PHOTON_TOKENS", "").split(",") if token])
        engine = store = None
        if args.workers:
            from photon.serving.ray_app import RayBackend, start_workers

            gpus = 0 if args.device == "cpu" or not torch.cuda.is_available() else 1
            processor = load_processor(args.model or ROOT)
            handle = start_workers(str(args.model or ROOT), args.workers, gpus, args.device)
            backend = RayBackend(handle, processor.image_processor, args.max_scans << 20)
        else:
            processor, model = load(args.model or ROOT, args.device, args.dtype)
            engine, store = Engine(processor, model, args.max_batch, args.max_waiting), ScanStore(args.max_scans << 20)
            backend = LocalBackend(engine, store)
    app = build_server(
        backend, tokens, Limits(upload_bytes=args.max_upload << 20), args.name, args.folder, args.timeout,
        processor=processor.image_processor, store=store,
    )  # fmt: skip
    print(f"The API is at http://{args.host}:{args.port}/v1 (Ctrl-C ends it)", flush=True)
    if tokens.made:
        print(f"Token: {tokens.made}", flush=True)
    uvicorn.run(
        app, host=args.host, port=args.port, access_log=False, log_level="warning", timeout_keep_alive=30,
        h11_max_incomplete_event_size=32 << 10, limit_concurrency=512,
    )  # fmt: skip
    if engine is not None:
        engine.close()


if __name__ == "__main__":
    main()
