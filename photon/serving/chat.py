"""Requests of the OpenAI API as prompts: what a request may say, checked, and where its scans come from.

A user's turn holds text and scans. A scan is an uploaded file or a path below the server's folder of scans:

    {"type": "file", "file": {"file_id": "file-..."}}
    {"type": "volume", "file_id": "file-..."}
    {"type": "volume", "path": "patients/7/ct.nii.gz", "modality": "ct", "series": 2, "frame": 0}
"""

from dataclasses import dataclass, field

ROLES = ("system", "developer", "user", "assistant")
READING = ("modality", "series", "frame")
MAX_MESSAGES, MAX_TEXT, MAX_SCANS = 64, 20_000, 4
IGNORED = {"user", "metadata", "store", "seed", "n", "stream_options", "service_tier", "safety_identifier"}


class RequestError(ValueError):
    """A request that cannot be answered. status: of HTTP; code: for programs; param: the field that is wrong."""

    def __init__(self, message, param=None, status=400, code="invalid_request"):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass
class ChatRequest:
    """A checked request.

    Args: chat: turns for the chat template, with {"type": "volume"} where a scan is; scans: a dict a scan, with
        "file_id" or "path" and the fields of `READING`; options: arguments of `Engine.ask`; stream, with_usage: how
        the answer is sent.
    """

    chat: list
    scans: list
    options: dict
    stream: bool = False
    with_usage: bool = False
    model: str = field(default="")


def parse_request(body, models):
    """A `ChatRequest` of a request's JSON. models: names that the server answers to. Raises `RequestError`."""
    if not isinstance(body, dict):
        raise RequestError("The body is a JSON object with model and messages.")
    model = body.get("model")
    if model not in models:
        raise RequestError(f"model is none that is served here; expected {' or '.join(models)}.", "model", 404,
                           "model_not_found")  # fmt: skip
    if body.get("n") not in (None, 1):
        raise RequestError("n is 1; send the question again for another answer.", "n")
    known = {"model", "messages", "stream", *OPTIONS, *ALIASES, *IGNORED}
    unknown = sorted(name for name, value in body.items() if name not in known and value is not None)
    if unknown:
        raise RequestError(f"{unknown[0][:40]} is not supported here; leave it out.", unknown[0][:40])
    chat, scans = parse_messages(body.get("messages"))
    stream = _checked(body, "stream", bool, False)
    usage = body.get("stream_options") if isinstance(body.get("stream_options"), dict) else {}
    return ChatRequest(chat, scans, parse_options(body), stream, bool(usage.get("include_usage")), model)


def parse_messages(messages):
    """(turns, scans) of the messages of a request."""
    if not isinstance(messages, list) or not 1 <= len(messages) <= MAX_MESSAGES:
        raise RequestError(f"messages is a list of 1 to {MAX_MESSAGES} turns.", "messages")
    chat, scans = [], []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RequestError(f"{where}.role is one of {', '.join(ROLES)}.", f"{where}.role")
        role = "system" if message["role"] == "developer" else message["role"]
        content = message.get("content")
        if isinstance(content, str):
            chat.append({"role": role, "content": _text(content, f"{where}.content")})
            continue
        if not isinstance(content, list) or not content:
            raise RequestError(f"{where}.content is a text or a list of parts.", f"{where}.content")
        parts = []
        for place, part in enumerate(content):
            parts.append(parse_part(part, f"{where}.content[{place}]", role, scans))
        chat.append({"role": role, "content": parts})
    if chat[-1]["role"] != "user":
        raise RequestError("The last of messages is the user's question.", "messages")
    if not scans:
        raise RequestError(
            'There is no scan in messages. Upload one with POST /v1/files, and add {"type": "volume", "file_id": ID} '
            "to the user's content.",
            "messages",
        )
    if len(scans) > MAX_SCANS:
        raise RequestError(f"messages has {len(scans)} scans; at most {MAX_SCANS} are read together.", "messages")
    return chat, scans


def parse_part(part, where, role, scans):
    """A part for the chat template; a scan goes to `scans`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text"):
        return {"type": "text", "text": _text(part.get("text"), f"{where}.text")}
    if kind not in ("volume", "file"):
        raise RequestError(f"{where}.type is text, volume or file; no pictures are read.", f"{where}.type")
    if role != "user":
        raise RequestError("A scan stands in a turn of the user.", where)
    given = part.get("file") if kind == "file" else {k: v for k, v in part.items() if k != "type"}
    if not isinstance(given, dict) or set(given) - {"file_id", "path", "filename", *READING}:
        raise RequestError(f"{where} has file_id or path, and {', '.join(READING)} if need be.", where)
    scan = {name: given[name] for name in ("file_id", "path") if given.get(name) is not None}
    if len(scan) != 1 or not all(isinstance(value, str) and 0 < len(value) <= 1000 for value in scan.values()):
        raise RequestError(f"{where} has either file_id or path, a text.", where)
    if given.get("modality") not in (None, "auto", "ct", "mr"):
        raise RequestError(f"{where}.modality is auto, ct or mr.", f"{where}.modality")
    for name in ("series", "frame"):
        if given.get(name) is not None and (isinstance(given[name], bool) or not isinstance(given[name], int)):
            raise RequestError(f"{where}.{name} is a whole number.", f"{where}.{name}")
    scans.append(scan | {name: given[name] for name in READING if given.get(name) not in (None, "auto")})
    return {"type": "volume"}


def _text(text, where):
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise RequestError(f"{where} is a text of at most {MAX_TEXT} characters.", where)
    if "<|" in text:
        raise RequestError(f"{where} has <|, with which the model's own marks begin; leave it out.", where)
    return text


def _checked(body, name, kind, default):
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RequestError(f"{name} is of another type.", name)
    return value


def _number(low, high, whole=False):
    kind = "a whole number" if whole else "a number"

    def check(name, value):
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right or not low <= value <= high:
            raise RequestError(f"{name} is {kind} from {low} to {high}.", name)
        return value

    return check


def _stop(name, value):
    words = [value] if isinstance(value, str) else value
    right = isinstance(words, list) and len(words) <= 4
    if not right or not all(isinstance(word, str) and 0 < len(word) < 100 for word in words):
        raise RequestError("stop is a text or a list of at most four.", name)
    return tuple(words)


def _flag(name, value):
    if not isinstance(value, bool):
        raise RequestError(f"{name} is true or false.", name)
    return value


OPTIONS = {
    "max_completion_tokens": _number(1, 100_000, whole=True),
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "stop": _stop,
    "token_budget": _number(1, 1_000_000, whole=True),
    "keep_ratio": _number(0, 1),
    "use_scheduler": _flag,
    "grounding": _flag,
}
ALIASES = {"max_tokens": "max_completion_tokens"}


def parse_options(body):
    """Arguments of `Engine.ask` of a request: lengths, sampling, stop words, what is kept."""
    given = {ALIASES.get(name, name): body[name] for name in (*OPTIONS, *ALIASES) if body.get(name) is not None}
    options = {name: OPTIONS[name](name, value) for name, value in given.items()}
    if "max_completion_tokens" in options:
        options["max_new_tokens"] = options.pop("max_completion_tokens")
    temperature, top_p = options.pop("temperature", 0), options.pop("top_p", None)
    if temperature:
        options |= {"do_sample": True, "temperature": float(temperature)}
        options |= {"top_p": float(top_p)} if top_p else {}
        seed = body.get("seed")
        options |= {"seed": _number(0, 2**63 - 1, whole=True)("seed", seed)} if seed is not None else {}
    if sum(name in options for name in ("token_budget", "keep_ratio")) > 1:
        raise RequestError("token_budget and keep_ratio exclude each other.", "token_budget")
    if options.get("use_scheduler") is False and {"token_budget", "keep_ratio"} & set(options):
        raise RequestError("use_scheduler=false keeps all; leave out token_budget and keep_ratio.", "use_scheduler")
    return options
