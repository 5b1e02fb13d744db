"""Starts the app: a page on which a person asks about a scan and sees what the model kept.

    python -m photon.app [--model DIR] [--port 7860] [--host 127.0.0.1]

Only this machine reaches the page unless --host says otherwise. Uploads are read into memory and deleted from the disk
at once; a visit's scan is forgotten when the page is closed, or after --idle minutes. Not a medical device.
"""

import argparse
import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id (default: this repository's tiny model)")
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address to listen on"
    )
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", 7860)))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--visits", type=int, default=16, help="people at the same time (default: %(default)s)")
    parser.add_argument(
        "--idle", type=float, default=30, help="minutes until an idle visit ends (default: %(default)s)"
    )
    parser.add_argument(
        "--max-upload", type=int, default=1024, metavar="MIB", help="largest upload (default: %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    import uvicorn

    from photon.app.server import build_app
    from photon.app.visits import Visits
    from photon.console import one_line_faults
    from photon.loading import ROOT, load
    from photon.serving.engine import Engine
    from photon.serving.incoming import Limits

    with one_line_faults():
        processor, model = load(args.model or ROOT, args.device, args.dtype)
    engine = Engine(processor, model)
    local = args.host in ("127.0.0.1", "localhost", "::1")
    app = build_app(
        engine,
        Visits(args.visits, 60 * args.idle),
        Limits(upload_bytes=args.max_upload << 20),
        tiny=args.model is None,
        hosts=["localhost", "127.0.0.1", "[::1]"] if local else ["*"],
    )
    print(f"Photon is at http://{'localhost' if local else args.host}:{args.port} (Ctrl-C ends it)", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, access_log=False, log_level="warning", timeout_keep_alive=30)
    engine.close()


if __name__ == "__main__":
    main()
