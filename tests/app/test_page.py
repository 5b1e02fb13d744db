"""The app in a browser: a scan of one's own, questions, planes, 3D, downloads; nothing from another host, no error.

Chromium is Debian's (`CHROMIUM` names another). Pictures go to the folder in PHOTON_SCREENSHOTS, if it is set.
"""

import os
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-app.txt playwright")
pytest.importorskip("gradio", reason="pip install -r requirements-app.txt")

from conftest import TOKENS, real  # noqa: E402
from photon.app.niivue import niivue_bundle  # noqa: E402
from running import running  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--enable-unsafe-swiftshader", "--use-angle=swiftshader", "--ignore-gpu-blocklist"]
WAIT = 300_000  # ms; the machine may be busy
CONTRAST = """(element) => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
    const c = rgb[i] / 255;
    return sum + weight * (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  }, 0);
  let ground = element;
  const opaque = (e) => { const c = numbers(getComputedStyle(e).backgroundColor); return c.length < 4 || c[3] === 1; };
  while (ground.parentElement && !opaque(ground)) ground = ground.parentElement;
  const colours = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor];
  const pair = colours.map((c) => light(numbers(c)));
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""
READABLE = [
    ".ph-title", ".ph-banner", ".ph-button[for]", "#photon-sample", "#photon-forget", "#photon-status p",
    ".pv-caption", ".pv-quiet", "#photon-chat small", ".pv-place", ".pv-pane figcaption", ".pv-grow",
    ".ph-downloads a",
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running("photon.app", tmp_path_factory.mktemp("app")) as server:
        yield server


@pytest.fixture(scope="module")
def chromium():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium, or name it in CHROMIUM")
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=WAIT)
        yield browser
        browser.close()


class Watched:
    """A page that notes what must not be: errors, warnings of the policy, requests elsewhere."""

    def __init__(self, browser, url, **options):
        self.page = browser.new_context(accept_downloads=True, **options).new_page()
        self.page.set_default_timeout(WAIT)
        self.faults, self.allowed = [], (url, "data:", "blob:")
        self.page.on("console", self.on_console)
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("request", self.on_request)
        self.page.on("response", self.on_response)

    def on_console(self, message):
        if message.type == "error":
            self.faults.append(f"console: {message.text}")

    def on_request(self, request):
        if not request.url.startswith(self.allowed):
            self.faults.append(f"elsewhere: {request.url}")

    def on_response(self, response):
        if response.status >= 400:
            self.faults.append(f"{response.status}: {response.url}")

    def close(self):
        self.page.context.close()


@pytest.fixture
def visit(chromium, server, request):
    """A page of the app; the test's parameters are options of the browser's context."""
    options = {"viewport": {"width": 1400, "height": 950}} | getattr(request, "param", {})
    watched = Watched(chromium, server.url, **options)
    watched.page.goto(server.url)
    watched.page.wait_for_function("window.photonApp && window.photonApp.visit")
    yield watched
    watched.close()


def choose(page, file):
    page.set_input_files("#photon-file", file)
    page.wait_for_selector("#photon-status.ph-good, #photon-status.ph-fault")
    return page.inner_text("#photon-status")


def ask(page, question):
    before = page.evaluate("window.photonApp.questions.length")
    page.fill("#photon-question textarea", question)
    page.press("#photon-question textarea", "Enter")
    page.wait_for_function(f"window.photonApp.questions.length === {before + 1}")


def until(page, expression):
    """Waits as `wait_for_function`, which evaluates within the page: an exported page's own policy forbids that."""
    end = time.monotonic() + WAIT / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(100)


def at(page):
    return page.evaluate("window.photonApp.viewer.at")


def picture(page, name):
    folder = os.environ.get("PHOTON_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def test_a_scan_of_ones_own(server, visit, tmp_path):
    """Upload, two questions, scrolling, comparing, 3D, downloads; then the visit leaves nothing behind."""
    scan, page = tmp_path / "doe_jane_19700101.nii.gz", visit.page
    shutil.copy(real("example_ct.nii.gz"), scan)
    scan.chmod(0o600)
    assert "122 × 101 × 112 voxels of 3 × 3 × 3 mm" in choose(page, scan)
    assert "mean nothing" in page.inner_text(".ph-banner") and "Not a medical device" in page.inner_text(".ph-banner")
    ask(page, "Is there a lesion in the liver?")
    ask(page, "Is there a lesion in the right lung?")
    chat = page.inner_text("#photon-chat")
    assert chat.count(f"of {TOKENS} tokens kept") == 2 and chat.count(", grounding ") == 2 and " s" in chat
    assert page.locator(".pv-pane canvas").count() == 3
    # planes are linked: the wheel, keys, a click and a slider move the cross-hair
    axial, coronal = page.locator(".pv-pane canvas").nth(0), page.locator(".pv-pane canvas").nth(1)
    start = at(page)
    axial.hover()
    page.mouse.wheel(0, 200)
    page.wait_for_function(f"window.photonApp.viewer.at[2] === {start[2] - 5}")
    coronal.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("PageDown")
    assert at(page) == [start[0] + 1, start[1] - 1, start[2] - 5]
    axial.click(position={"x": 100, "y": 100})
    assert at(page)[:2] != start[:2] and at(page)[2] == start[2] - 5
    page.locator(".pv-pane input").nth(2).fill("60")
    assert at(page)[0] == 60 and "HU" in page.inner_text(".pv-place")
    page.locator(".pv-bar select").nth(0).select_option("bone")
    assert page.evaluate("window.photonApp.viewer.window") == [-500, 1300]
    page.locator(".pv-bar select").nth(2).select_option("0")  # the first question beside the second
    assert page.locator(".pv-pane canvas").count() == 6 and page.locator(".pv-caption").count() == 2
    picture(page, "wide_light")
    # what is kept, on the scan's voxels
    with page.expect_download() as waiting:
        page.get_by_text("kept map of question 2").click()
    waiting.value.save_as(tmp_path / "kept.nii.gz")
    kept, image = sitk.ReadImage(str(tmp_path / "kept.nii.gz")), sitk.ReadImage(str(scan))
    assert kept.GetSize() == image.GetSize()
    np.testing.assert_allclose(kept.GetOrigin(), image.GetOrigin(), atol=1e-3)
    np.testing.assert_allclose(kept.GetDirection(), image.GetDirection(), atol=1e-5)
    assert set(np.unique(sitk.GetArrayViewFromImage(kept))) == {0, 1}
    with page.expect_download() as waiting:
        page.get_by_text("page to keep").click()
    waiting.value.save_as(tmp_path / "page.html")
    assert "doe_jane" not in (tmp_path / "page.html").read_text("utf-8")
    if niivue_bundle() is not None:
        page.locator("#photon-3d summary").click()
        page.wait_for_function("/coloured/.test(document.getElementById('photon-3d-note').textContent)")
        assert page.evaluate("window.photonApp.nv.volumes.length") == 2
        page.wait_for_timeout(500)
        picture(page, "wide_light_3d")
    assert visit.faults == []
    name = page.evaluate("window.photonApp.visit")
    page.goto("about:blank")
    end = time.monotonic() + WAIT / 1000
    while page.request.get(f"{server.url}/photon/visits/{name}/scan.json").status != 404:
        assert time.monotonic() < end, "the page was left, so the scan is gone"
        page.wait_for_timeout(100)
    assert server.left_on_disk() == [] and "doe_jane" not in server.log() + "".join(map(str, server.temp.rglob("*")))


def test_only_this_machine_reaches_it(server):
    """It listens on 127.0.0.1, and on no other address of this machine."""
    socket.create_connection(("127.0.0.1", server.port), timeout=10).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), timeout=10).close()


@pytest.mark.parametrize("visit", [{"color_scheme": "dark"}, {"color_scheme": "light"}], indirect=True)
def test_texts_are_readable(visit, request):
    page = visit.page
    page.click("#photon-sample")
    page.wait_for_selector("#photon-status.ph-good")
    ask(page, "Is there a lesion in the right lung?")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert page.evaluate("document.body.classList.contains('dark')") == dark
    for selector in READABLE:
        ratio = page.locator(selector).first.evaluate(CONTRAST)
        assert ratio >= 4.5, (selector, ratio)  # what WCAG asks for
    picture(page, "wide_dark" if dark else "sample_light")
    assert visit.faults == []


@pytest.mark.parametrize("visit", [{"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}], indirect=True)
def test_a_narrow_window(visit):
    page = visit.page
    page.click("#photon-sample")
    page.wait_for_selector("#photon-status.ph-good")
    ask(page, "Is there a lesion in the spleen?")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for selector in ("#photon-status", ".pv-bar", "#photon-question textarea", "#photon-budget"):
        box = page.locator(selector).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390, selector
    picture(page, "narrow_dark")
    assert visit.faults == []


def test_refusals_tell_what_to_do(visit, tmp_path):
    """A constant image; a file that is no scan; an MR scan whose header does not say so, read after a choice."""
    page = visit.page
    sitk.WriteImage(sitk.Image(20, 21, 22, sitk.sitkInt16), str(tmp_path / "a.nii.gz"))
    (tmp_path / "notes.zip").write_bytes(b"no zip")
    told = choose(page, tmp_path / "a.nii.gz")
    assert "All voxels are 0" in told and "CONSTANT_IMAGE" in told
    page.evaluate("document.getElementById('photon-status').className = ''")
    assert "no scan by its content" in choose(page, tmp_path / "notes.zip")
    picture(page, "refused")
    page.evaluate("document.getElementById('photon-status').className = ''")
    told = choose(page, real("example_mr_sm.nii.gz"))
    assert "Kind of scan" in told and "Read again" in told
    page.select_option("#photon-kind", "mr")
    page.click("#photon-again")
    page.wait_for_selector("#photon-status.ph-good")
    assert "MR scan" in page.inner_text("#photon-status")
    ask(page, "Is there a lesion in the liver?")
    assert [fault for fault in visit.faults if "422" not in fault] == []  # the refusals themselves


def test_without_a_scan_and_with_a_budget(visit):
    page = visit.page
    page.fill("#photon-question textarea", "Is there?")
    page.press("#photon-question textarea", "Enter")
    page.get_by_text("Choose a scan above first").wait_for()
    page.click("#photon-sample")
    page.wait_for_selector("#photon-status.ph-good")
    page.fill("#photon-budget input[type=number]", "17")
    page.press("#photon-budget input[type=number]", "Tab")
    ask(page, "<img src=x onerror=alert(1)> **Is** there?")  # a question is no markup
    assert f"17 of {TOKENS} tokens kept" in page.inner_text("#photon-chat")
    assert page.locator("#photon-viewer img, #photon-chat img[src=x], #photon-chat strong").count() == 0
    assert "<img src=x onerror=alert(1)> **Is** there?" in page.inner_text("#photon-chat")
    assert visit.faults == []


def test_another_scan_and_an_emptied_chat(visit):
    """Answers about the scan before go with it; the chat's own button forgets what was kept, too."""
    page = visit.page
    for _ in range(2):
        page.evaluate("document.getElementById('photon-status').className = ''")
        page.click("#photon-sample")
        page.wait_for_selector("#photon-status.ph-good")
        until(page, "!document.querySelector('#photon-chat small')")
        assert page.is_hidden("#photon-downloads") and page.locator(".pv-caption").count() == 0
        ask(page, "Is there a lesion in the liver?")
        assert page.evaluate("window.photonApp.questions.length") == 1 and page.is_visible("#photon-downloads")
    page.locator("#photon-chat button[title='Clear'], #photon-chat button[aria-label='Clear']").click()
    page.wait_for_function("window.photonApp.questions.length === 0")
    assert page.is_hidden("#photon-downloads") and page.locator(".pv-caption").count() == 0
    assert visit.faults == []


def test_the_planes_and_their_caption(visit):
    """One plane is large, another one can be; the sentence about the planes is shown where it is true."""
    page = visit.page
    page.click("#photon-sample")
    page.wait_for_selector("#photon-status.ph-good")
    ask(page, "Is there a lesion in the right lung?")

    def width(number):
        return page.locator(".pv-pane canvas").nth(number).bounding_box()["width"]

    assert width(0) > 1.5 * width(1) and width(1) == width(2)
    page.get_by_role("button", name="enlarge the coronal plane").click()
    assert width(1) > 1.5 * width(0) and width(0) == width(2)
    reason = page.get_by_text("Planes through the middle of what was kept on the right side in lung tissue.")
    assert reason.is_visible()
    page.locator(".pv-pane canvas").nth(1).focus()
    page.keyboard.press("PageDown")
    reason.wait_for(state="hidden")
    page.keyboard.press("PageUp")
    reason.wait_for(state="visible")
    assert visit.faults == []


def test_the_exported_page_is_offline(chromium, tmp_path):
    """As `ask.py --html` writes it: opened from the disk it asks for nothing, and scrolls."""
    import ask as command
    from photon.app.scans import sample

    sitk.WriteImage(sample(0)[0], str(tmp_path / "scan.nii.gz"))
    file = tmp_path / "out.html"
    command.main([str(tmp_path / "scan.nii.gz"), "Is there a lesion in the liver?", "--html", str(file),
                  "--compare", "Is there a lesion in the right lung?"])  # fmt: skip
    watched = Watched(chromium, file.as_uri(), offline=True)
    page = watched.page
    page.goto(file.as_uri())
    until(page, "viewer.questions.length === 2")
    assert page.locator(".pv-pane canvas").count() == 6
    start = page.evaluate("viewer.at")
    page.locator(".pv-pane canvas").first.hover()
    page.mouse.wheel(0, -120)
    until(page, f"viewer.at[2] === {start[2] + 3}")
    bright = """() => {
      const c = document.querySelector('.pv-pane canvas');
      const values = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
      return values.filter((v, i) => i % 4 === 0 && v > 100).length;
    }"""
    assert page.evaluate(bright) > 500  # something is drawn
    picture(page, "exported")
    assert watched.faults == []
    watched.close()


def test_the_space_runs(tmp_path):
    """The built folder alone, as a Space starts it, gives the page."""
    import subprocess
    import sys
    import urllib.request

    from photon.publishing.space import build_space
    from running import free_port

    if niivue_bundle() is None:
        pytest.skip("NiiVue is not installed: npm ci --prefix photon/app --ignore-scripts")
    folder, port = build_space(tmp_path / "space"), free_port()
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    environment.pop("PYTHONPATH", None)
    process = subprocess.Popen([sys.executable, "space/app.py"], cwd=folder, env=environment)
    try:
        end = time.monotonic() + WAIT / 1000
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/photon/static/niivue.js", timeout=5) as reply:
                    assert reply.status == 200
                    break
            except OSError:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.5)
    finally:
        process.terminate()
        process.wait(120)
