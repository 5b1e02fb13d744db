"""The Gradio page: a scan, its planes, and a chat about it. Uploads do not go through Gradio; see `routes.py`."""

import math
import re

import gradio as gr

from photon.serving.engine import Answer, Busy, EngineError

TITLE = "Photon: ask about a CT or MR scan"
SUGGESTIONS = (
    "Is there a lesion in the liver?",
    "Is there a lesion in the right lung?",
    "Is there a lesion in the left kidney?",
    "How many lesions are in the liver?",
)
NO_SCAN = "Choose a scan above first: a file of your own, or a sample."
BANNER = (
    "Not a medical device. For research on scans that you are allowed to use; no answer may reach a patient. Outlines "
    "show what the model kept, not why it answered."
)
TINY = (
    "This model is tiny and has learnt synthetic scans only. About a real scan its answers mean nothing; they show "
    "how the page works."
)
SCAN_PANEL = """
<div id="photon-scan" class="ph-scan">
  <div class="ph-drop" id="photon-drop">
    <label class="ph-button" for="photon-file">Choose a scan</label>
    <input id="photon-file" type="file" accept=".nii,.gz,.nrrd,.mha,.dcm,.zip" class="ph-file">
    <span>or drop it here: NIfTI, NRRD, MetaImage, or a zip of one DICOM series</span>
    <span class="ph-or">No scan at hand?</span>
    <button type="button" id="photon-sample" class="ph-button ph-second">Take a sample</button>
  </div>
  <div class="ph-ways">
    <label>Kind of scan <select id="photon-kind">
      <option value="auto">by its header</option><option value="ct">CT</option><option value="mr">MR</option>
    </select></label>
    <label>Series <input id="photon-series" type="number" min="1" placeholder="number"></label>
    <label>Frame <input id="photon-frame" type="number" min="0" placeholder="number"></label>
    <button type="button" id="photon-again" class="ph-button ph-second" disabled>Read again</button>
    <button type="button" id="photon-forget" class="ph-button ph-second" disabled>Forget the scan</button>
  </div>
  <div id="photon-status" class="ph-status" role="status" aria-live="polite">No scan yet.</div>
</div>
"""
VIEW_PANEL = """
<div id="photon-viewer"><p class="ph-empty">The scan appears here in three planes. Choose one of your own, or take a
sample; then ask about it.</p></div>
<div id="photon-downloads" class="ph-downloads" hidden></div>
<details id="photon-3d" class="ph-3d" hidden>
  <summary>3D view</summary>
  <p class="ph-quiet" id="photon-3d-note"></p>
  <div class="ph-3d-frame">
    <canvas id="photon-3d-canvas" tabindex="0" aria-label="3D view of the scan and of what was kept"></canvas>
  </div>
</details>
"""
SEND = "(...values) => { values[2] = window.photonApp.visit; return values; }"
REFRESH = "() => window.photonApp.refresh()"
VISIT = "() => [window.photonApp.visit]"
HEAD = """
<link rel="stylesheet" href="/photon/static/viewer.css">
<link rel="stylesheet" href="/photon/static/app.css">
<script src="/photon/static/viewer.js" defer></script>
<script src="/photon/static/app.js" defer></script>
"""


def theme():
    """A theme with the fonts of the reader's system: none is fetched from another host."""
    text = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    soft = gr.themes.Soft(primary_hue="blue", font=text, font_mono=["ui-monospace", "monospace"])
    quiet = {"light": "#566072", "dark": "#a3afc0"}  # the theme's own are too faint to read
    fields = ("body_text_color_subdued", "block_info_text_color", "input_placeholder_color")
    edge = {"light": "#8a94a6", "dark": "#66728a"}  # fields are seen as fields
    plain = {"block_title_background_fill": "transparent", "block_title_text_color": "*body_text_color",
             "block_label_text_color": "*body_text_color"}  # labels do not look like buttons # fmt: skip
    edges = ("input_border_color", "checkbox_border_color", "border_color_primary")
    return soft.set(
        input_border_width="1px",
        block_border_width="1px",
        block_title_padding="0",
        slider_color="#1d4ed8",
        slider_color_dark="#60a5fa",
        **plain,
        **{f"{field}_dark": value for field, value in plain.items()},
        **{field: edge["light"] for field in edges},
        **{f"{field}_dark": edge["dark"] for field in edges},
        **{field: quiet["light"] for field in fields},
        **{f"{field}_dark": quiet["dark"] for field in fields},
    )


def build_page(engine, visits, tiny, timeout=120.0):
    """The page as `gr.Blocks`. tiny: whether to tell that the model is the tiny one; timeout: seconds an answer."""
    volumes = engine.processor.image_processor
    tokens = math.prod(volumes.grid_thw) // volumes.merge_size**2

    def answer(question, history, name, budget, with_earlier):
        """Yields (history, text box) while the answer grows."""
        visit, question = visits.get(name), question.strip()
        history = list(history or ())
        if not question:
            yield history, ""
            return
        history += [{"role": "user", "content": as_text(question)}, {"role": "assistant", "content": "…"}]
        if visit is None or visit.scan is None:
            history[-1]["content"] = NO_SCAN
            yield history, question
            return
        yield history, ""
        scan, asked = visit.scan, None
        try:
            options = {"token_budget": int(budget)} if budget else {}
            asked = engine.ask(chat_of(visit.turns if with_earlier else (), question), [scan.encoded],
                               timeout=timeout, grounding=True, **options)  # fmt: skip
            text = ""
            for event in asked:
                if not isinstance(event, Answer):
                    text += event
                    history[-1]["content"] = as_text(text)
                    yield history, ""
        except (Busy, TimeoutError, EngineError, ValueError) as error:
            history[-1]["content"] = str(error)
            yield history, question
            return
        finally:
            if asked is not None:
                asked.cancel()  # where the visitor left in the middle; without effect on an answer that is complete
        if visit.scan is scan:  # another one may have been chosen meanwhile
            remember(engine, visit, question, event)
        history[-1]["content"] = f"{as_text(event.text) or '(empty answer)'}\n\n<small>{figures(event)}</small>"
        yield history, ""

    def forget(name):
        visit = visits.get(name)
        if visit is not None:
            visit.forget_answers()

    plain = {"padding": False, "apply_default_css": False}
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        notice = f'<p class="ph-banner" role="note"><strong>{BANNER}</strong>{" " + TINY if tiny else ""}</p>'
        gr.HTML(
            f"<h1 class='ph-title'>Photon: ask about a CT or MR scan</h1>{notice}",
            padding=False,
            apply_default_css=False,
        )
        gr.HTML(SCAN_PANEL, **plain)
        with gr.Row(elem_classes="ph-main"):
            with gr.Column(scale=5, min_width=560):
                gr.HTML(VIEW_PANEL, **plain)
            with gr.Column(scale=3, min_width=320):
                chat = gr.Chatbot(label="Answers", show_label=False, height=420, buttons=[], feedback_options=None,
                                  latex_delimiters=[], placeholder="Ask about the scan.",
                                  elem_id="photon-chat")  # fmt: skip
                box = gr.Textbox(label="Question", placeholder="Is there a lesion in the liver?", lines=1,
                                 max_lines=4, elem_id="photon-question", submit_btn="Ask", stop_btn=False)  # fmt: skip
                gr.Examples([[text] for text in SUGGESTIONS], [box], label="Questions to try", cache_examples=False)
                budget = gr.Slider(0, tokens, 0, step=1, elem_id="photon-budget", buttons=[],
                                   label="Token budget",
                                   info="How many visual tokens stay; 0 leaves it to the model.")  # fmt: skip
                earlier = gr.Checkbox(False, label="Send earlier questions and answers too")
        name = gr.Textbox(visible=False)  # filled by the page's script when a question is sent
        sent = box.submit(answer, [box, chat, name, budget, earlier], [chat, box], js=SEND, show_progress="hidden",
                          concurrency_limit=engine.max_batch, api_visibility="private")  # fmt: skip
        sent.then(None, js=REFRESH)
        chat.clear(forget, [name], js=VISIT, api_visibility="private").then(None, js=REFRESH)
        # pressed by the page's script when another scan is shown, whose chat is empty
        gr.Button(elem_id="photon-clear", visible="hidden").click(list, None, [chat], api_visibility="private")
    page.queue(max_size=engine.max_waiting)
    return page


def as_text(text):
    """A text as Markdown that shows it as it is: no markup, no picture, no link of a question or an answer."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~<>&$])", r"\\\1", text)


def chat_of(turns, question):
    """Turns for the chat template: earlier questions with their answers, the scan in the first, then the question."""
    chat = []
    for turn in turns:
        chat += [{"role": "user", "content": turn["question"]}, {"role": "assistant", "content": turn["answer"]}]
    chat.append({"role": "user", "content": question})
    chat[0]["content"] = [{"type": "volume"}, {"type": "text", "text": chat[0]["content"]}]
    return chat


def remember(engine, visit, question, answer):
    """Adds an answer to a visit, with the map of what was kept for the viewer."""
    kept = engine.keep_map([visit.scan.encoded], answer.keep_mask)
    counts = {"tokens_kept": answer.tokens_kept, "tokens_seen": answer.tokens_seen}
    visit.turns.append(visit.scan.packed.question(kept, question, answer.text, **counts))
    visit.masks.append(answer.keep_mask)


def figures(answer):
    """One line about an answer: what was kept, how much the answer rests on it, and the seconds."""
    share = answer.tokens_kept / max(1, answer.tokens_seen)
    threshold = "" if answer.threshold is None else f", threshold {answer.threshold:.2f}"
    cut = {"length": "; cut at the longest answer", "timeout": "; cut, it took too long"}.get(answer.finish_reason, "")
    grounding = "" if answer.grounding is None else f", grounding {answer.grounding:+.2f}"
    seconds = answer.seconds["waiting"] + answer.seconds["first_token"] + answer.seconds["decode"]
    kept = f"{answer.tokens_kept} of {answer.tokens_seen} tokens kept ({share:.0%})"
    return f"{kept}{threshold}{grounding}; {seconds:.1f} s{cut}"
