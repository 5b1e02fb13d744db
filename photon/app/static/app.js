/* The page's own script: uploads, samples, the viewer, the 3D view. Gradio does the chat. */

"use strict";

const app = {
  visit: null,
  viewer: null,
  file: null,
  nv: null,
  questions: [],

  async start() {
    this.find = (name) => document.getElementById(`photon-${name}`);
    this.find("file").addEventListener("change", (event) => this.upload(event.target.files[0]));
    this.find("sample").addEventListener("click", () => this.sample());
    this.find("again").addEventListener("click", () => this.upload(this.file));
    this.find("forget").addEventListener("click", () => location.reload());
    this.find("3d").addEventListener("toggle", () => this.show3d());
    const drop = this.find("drop");
    for (const name of ["dragover", "dragleave", "drop"]) {
      drop.addEventListener(name, (event) => {
        event.preventDefault();
        drop.classList.toggle("ph-over", name === "dragover");
        if (name === "drop") this.upload(event.dataTransfer.files[0]);
      });
    }
    window.addEventListener("pagehide", () => this.end());
    window.addEventListener("pageshow", (event) => event.persisted && location.reload());
    setInterval(() => this.visit && fetch(this.path("alive"), { method: "POST" }), 300000);
    await this.begin();
  },

  async begin() {
    const reply = await fetch("/photon/visits", { method: "POST" });
    const body = await reply.json();
    if (!reply.ok) return this.tell("ph-fault", body.detail);
    this.visit = body.visit;
    this.with3d = body.with_3d;
  },

  end() {
    if (this.visit) navigator.sendBeacon(this.path("end"));
    this.visit = null;
  },

  path(rest) {
    return `/photon/visits/${this.visit}/${rest}`;
  },

  tell(kind, ...lines) {
    const status = this.find("status");
    status.className = `ph-status ${kind}`;
    status.replaceChildren(...lines.map((line) => {
      const paragraph = document.createElement("p");
      paragraph.textContent = line;
      return paragraph;
    }));
  },

  upload(file) {
    if (!file) return;
    this.file = file;
    const query = new URLSearchParams({ modality: this.find("kind").value });
    for (const name of ["series", "frame"]) {
      if (this.find(name).value !== "") query.set(name, this.find(name).value);
    }
    this.find("file").value = ""; // so that the same file may be chosen again
    return this.take(`scan?${query}`, file, `Reading ${(file.size / 2 ** 20).toFixed(1)} MiB …`);
  },

  sample() {
    this.number = ((this.number ?? -1) + 1) % 6;
    return this.take(`sample/${this.number}`, null, "Making a synthetic scan …");
  },

  async take(path, body, waiting) {
    this.tell("ph-busy", waiting);
    let reply, facts;
    try {
      reply = await fetch(this.path(path), { method: "POST", body });
      facts = await reply.json();
    } catch (error) {
      return this.tell("ph-fault", "The server cannot be reached. Is it still running?");
    }
    this.find("again").disabled = !this.file;
    if (!reply.ok) {
      if (facts.code) return this.tell("ph-fault", `The scan was refused: ${facts.message}`, facts.step, `Code: ${facts.code}`);
      return this.tell("ph-fault", typeof facts.detail === "string" ? facts.detail : "The request was refused.");
    }
    const scan = await (await fetch(this.path("scan.json"))).json();
    if (this.questions.length) document.getElementById("photon-clear").click(); // they are about the scan before
    this.questions = [];
    this.viewer = this.viewer || new PhotonViewer(this.find("viewer"));
    await this.viewer.load(scan);
    const lesions = facts.lesions && (facts.lesions.length ? ` It has lesions in: ${facts.lesions.join(", ")}.` : " It has no lesion.");
    const made = facts.lesions ? `A synthetic CT that the model was not trained on.${lesions}` : `${facts.kind} scan.`;
    const size = `${facts.size.join(" × ")} voxels of ${facts.spacing.join(" × ")} mm; ${facts.tokens} visual tokens.`;
    this.tell("ph-good", `${made} ${size}`, ...facts.notes.map((note) => `Note: ${note}`));
    this.find("forget").disabled = false;
    this.find("downloads").hidden = true;
    this.find("3d").hidden = !this.with3d;
    if (this.find("3d").open) await this.show3d();
  },

  /* After an answer: fetches what was kept, and shows the newest question. */
  async refresh() {
    if (!this.visit || !this.viewer) return;
    const reply = await fetch(this.path("questions.json"));
    if (!reply.ok) return;
    const questions = await reply.json();
    if (questions.length === this.questions.length) return;
    this.questions = questions;
    await this.viewer.setQuestions(questions);
    const links = questions.map((item, n) => this.link(`kept/${n}.nii.gz`, `kept_${n + 1}.nii.gz`, `kept map of question ${n + 1}`));
    links.push(this.link("page.html", "photon.html", "page to keep (HTML)"));
    this.find("downloads").replaceChildren("Download: ", ...links);
    this.find("downloads").hidden = !questions.length;
    if (this.find("3d").open) await this.show3d();
  },

  link(path, name, text) {
    const link = document.createElement("a");
    Object.assign(link, { href: this.path(path), download: name, textContent: text });
    return link;
  },

  /* A colour map of one colour, as NiiVue takes it: the planes' outlines have the same. */
  ramp(colour) {
    const [r, g, b] = [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
    return { R: [r, r], G: [g, g], B: [b, b], A: [0, 255], I: [0, 255] };
  },

  async show3d() {
    if (!this.find("3d").open || !this.viewer) return;
    const note = this.find("3d-note"), canvas = this.find("3d-canvas");
    if (!document.createElement("canvas").getContext("webgl2")) {
      note.textContent = "The 3D view needs WebGL 2, which this browser does not have or has turned off.";
      canvas.hidden = true;
      return;
    }
    note.textContent = "Loading …";
    try {
      const { Niivue } = await import("/photon/static/niivue.js");
      if (!this.nv) {
        this.nv = new Niivue({ backColor: [0, 0, 0, 1], show3Dcrosshair: false, isColorbar: false,
          isOrientationTextVisible: true, loadingText: "", logLevel: "error" });
        await this.nv.attachToCanvas(canvas);
        this.nv.setSliceType(this.nv.sliceTypeRender);
        COLOURS.forEach((colour, n) => this.nv.addColormap(`photon${n}`, this.ramp(colour)));
      }
      const [low, high] = this.viewer.scan.window;
      const volumes = [{ url: this.path("scan.nii.gz"), name: "scan.nii.gz", colormap: "gray", cal_min: low, cal_max: high }];
      if (this.questions.length) {
        const last = this.questions.length - 1;
        volumes.push({ url: this.path(`kept/${last}.nii.gz?small=true`), name: "kept.nii.gz", opacity: 0.5,
          colormap: `photon${last % COLOURS.length}`, cal_min: 0.5, cal_max: 1 });
      }
      await this.nv.loadVolumes(volumes);
      this.nv.setRenderAzimuthElevation(150, 15); // from the front and a little from above
      this.nv.setClipPlane([2, 0, 0]); // cuts nothing until the reader scrolls
      note.textContent = this.questions.length
        ? `What was kept for question ${this.questions.length} is coloured. Drag to turn.`
        : "Drag to turn.";
    } catch (error) {
      note.textContent = "The 3D view could not be shown by this browser.";
    }
  },
};

window.photonApp = app;

(function wait() { // Gradio puts the page's elements in place some time after this script has run
  if (document.getElementById("photon-viewer") && document.getElementById("photon-scan")) app.start();
  else requestAnimationFrame(wait);
})();
