/* Three linked planes of a scan with the outlines of what was kept, for one question or for two beside each other.

   const viewer = new PhotonViewer(element);
   await viewer.load(scan);              // what PackedScan.scan gives
   await viewer.setQuestions(questions, 0, 1); // a list of what PackedScan.question gives; two of them beside each other

No library and no network. Radiological convention: the patient's right is on the left of axial and coronal planes.
Mouse: click or drag moves the cross-hair, the wheel scrolls. Keys on a plane: arrows move the cross-hair, Page Up and
Page Down scroll. */

"use strict";

const PLANES = {
  // axes are 0 (x, to the left), 1 (y, to the back), 2 (z, to the head); rows of z run from the head down
  axial: { axis: 2, columns: 0, rows: 1, sides: ["R", "L", "A", "P"] },
  coronal: { axis: 1, columns: 0, rows: 2, sides: ["R", "L", "S", "I"] },
  sagittal: { axis: 0, columns: 1, rows: 2, sides: ["A", "P", "S", "I"] },
};
const COLOURS = ["#ffb000", "#4cc9f0", "#f15bb5", "#9ef01a"];
const WHEEL_STEP = 40; // pixels of a wheel or a trackpad for one slice

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, run] of Object.entries(value)) element.addEventListener(event, run);
    else if (value !== false && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

async function inflate(text, Kind) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Kind(await new Response(stream).arrayBuffer());
}

class PhotonViewer {
  constructor(element) {
    this.element = element;
    this.scan = null;
    this.questions = [];
    this.shown = [null, null]; // numbers of the questions of the first and the second row
    this.panes = [];
    this.reason = null; // the element that says why the planes are where they are
    this.outlines = true;
    this.lead = "axial"; // the large plane, where one question is shown
    element.classList.add("pv");
    this.bar = make("div", { class: "pv-bar" });
    this.rows = make("div", { class: "pv-rows" });
    this.place = make("output", { class: "pv-place" });
    element.replaceChildren(this.bar, this.rows, this.place);
    new ResizeObserver(() => this.draw()).observe(element);
  }

  /* Shows a scan without questions, its planes through the middle. */
  async load(scan) {
    const voxels = await inflate(scan.voxels, Int16Array);
    this.scan = scan;
    this.voxels = voxels;
    this.questions = [];
    this.shown = [null, null];
    this.at = scan.size.map((n) => n >> 1);
    this.window = [...scan.window];
    this.windowChosen = false;
    this.build();
  }

  /* Shows question number `first`, from where it points to, and beside it number `second` to compare. */
  async setQuestions(questions, first = questions.length - 1, second = null) {
    for (const [number, item] of questions.entries()) {
      const known = this.questions[number];
      item.mask = known && known.kept === item.kept ? known.mask : await inflate(item.kept, Uint8Array);
    }
    this.questions = questions;
    this.shown = [questions.length ? first : null, second];
    if (questions.length) this.goTo(first);
    this.build();
  }

  /* Places the cross-hair where a question points to, in its window unless the reader has chosen one. */
  goTo(number) {
    const item = this.questions[number];
    this.at = [...item.at];
    if (!this.windowChosen) this.window = [...item.window];
  }

  build() {
    this.buildBar();
    this.panes = [];
    this.reason = null;
    this.rows.replaceChildren();
    const rows = this.shown[1] === null ? [0] : [0, 1];
    for (const row of rows) {
      const item = this.questions[this.shown[row]];
      if (item) this.rows.append(this.caption(item, this.shown[row], row));
      const line = make("div", { class: rows.length === 1 ? "pv-row pv-single" : "pv-row" });
      for (const name of Object.keys(PLANES)) line.append(this.pane(name, row));
      this.rows.append(line);
    }
    this.draw();
  }

  caption(item, number, row) {
    const swatch = make("span", { class: "pv-swatch", style: `background:${COLOURS[number % COLOURS.length]}` });
    const count = item.tokens_seen ? ` ${item.tokens_kept} of ${item.tokens_seen} tokens kept. ` : " ";
    const answer = make("strong", {}, item.answer || "(empty answer)");
    const line = make("p", { class: "pv-caption" }, swatch, ` ${item.question} `, answer, make("span", { class: "pv-quiet" }, count));
    if (row) return line; // the planes are the first question's
    this.reason = make("span", { class: "pv-quiet" }, `${item.reason[0].toUpperCase()}${item.reason.slice(1)}.`);
    this.reason.at = item.at;
    line.append(this.reason);
    return line;
  }

  buildBar() {
    const choose = (label, chosen, entries, pick) => {
      const select = make("select", { on: { change: () => pick(select.value) } });
      for (const [value, text] of entries) select.append(make("option", { value, selected: value === chosen }, text));
      return make("label", {}, label, select);
    };
    const same = (ends) => ends.every((end, i) => Math.abs(end - this.window[i]) < 0.5);
    const presets = Object.entries(this.scan.presets);
    const current = presets.find(([, ends]) => same(ends));
    const entries = presets.map(([name]) => [name, name]);
    if (!current) entries.unshift(["", "own"]);
    const number = (end, label) => {
      const input = make("input", {
        type: "number", step: "any", "aria-label": label, value: +this.window[end].toPrecision(4),
        on: { change: () => {
          const ends = [...this.window];
          ends[end] = Number(input.value);
          if (ends[0] < ends[1]) this.setWindow(ends);
          this.buildBar();
          this.draw();
        } },
      });
      return input;
    };
    const window_ = choose("Window ", current ? current[0] : "", entries, (name) => {
      if (name) this.setWindow([...this.scan.presets[name]]);
      this.buildBar();
      this.draw();
    });
    const range = make("span", { class: "pv-range" }, number(0, "lower end of the window"), " to ",
      number(1, "upper end of the window"), ` ${this.scan.unit}`);
    this.bar.replaceChildren(window_, range);
    if (!this.questions.length) return;
    const box = make("input", { type: "checkbox", checked: this.outlines, on: { change: () => {
      this.outlines = box.checked;
      this.draw();
    } } });
    this.bar.append(make("label", {}, box, " outlines"));
    const list = this.questions.map((item, n) => [String(n), `${n + 1}. ${item.question}`]);
    this.bar.append(choose("Question ", String(this.shown[0]), list, (value) => {
      this.shown[0] = Number(value);
      this.goTo(this.shown[0]);
      this.build();
    }));
    if (this.questions.length < 2) return;
    const second = this.shown[1] === null ? "" : String(this.shown[1]);
    this.bar.append(choose("Compare with ", second, [["", "none"], ...list], (value) => {
      this.shown[1] = value === "" ? null : Number(value);
      this.build();
    }));
  }

  setWindow(ends) {
    this.window = ends;
    this.windowChosen = true;
  }

  pane(name, row) {
    const plane = PLANES[name];
    const last = this.scan.size[plane.axis] - 1;
    const title = make("span", {});
    const canvas = make("canvas", { tabindex: 0, role: "application",
      "aria-label": `${name} plane: arrow keys move the cross-hair, page up and page down change the slice` });
    const slider = make("input", { type: "range", min: 0, max: last, "aria-label": `${name} slice`,
      on: { input: () => this.moveTo(plane.axis, Number(slider.value)) } });
    const single = this.shown[1] === null;
    const kind = single && name === this.lead ? "pv-pane pv-lead" : "pv-pane";
    const figure = make("figure", { class: kind }, make("figcaption", {}, title), canvas, slider);
    const grow = make("button", { type: "button", class: "pv-grow", "aria-label": `enlarge the ${name} plane`,
      on: { click: () => {
        if (single) {
          this.lead = name;
          this.build();
        } else {
          figure.classList.toggle("pv-large");
          this.draw();
        }
      } } }, "enlarge");
    figure.firstChild.append(grow);
    const pane = { name, plane, row, canvas, slider, title, turned: 0 };
    const point = (event) => {
      const { left, top, scaleX, scaleY, columns, rows } = pane.drawn;
      const box = canvas.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left - left) / scaleX);
      const line = Math.floor((event.clientY - box.top - top) / scaleY);
      if (column < 0 || line < 0 || column >= columns || line >= rows) return;
      this.at[plane.columns] = column;
      this.at[plane.rows] = plane.rows === 2 ? rows - 1 - line : line;
      this.draw();
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      point(event);
    });
    canvas.addEventListener("pointermove", (event) => event.buttons && point(event));
    canvas.addEventListener("wheel", (event) => {
      pane.turned += event.deltaMode ? Math.sign(event.deltaY) * WHEEL_STEP : event.deltaY;
      const slices = Math.trunc(pane.turned / WHEEL_STEP);
      pane.turned -= slices * WHEEL_STEP;
      const before = this.at[plane.axis];
      this.moveTo(plane.axis, before - slices);
      if (!slices || this.at[plane.axis] !== before) event.preventDefault(); // at the end the page scrolls
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const up = plane.rows === 2 ? 1 : -1;
      const moves = { ArrowLeft: [plane.columns, -1], ArrowRight: [plane.columns, 1], ArrowUp: [plane.rows, up],
        ArrowDown: [plane.rows, -up], PageUp: [plane.axis, 1], PageDown: [plane.axis, -1] };
      const move = moves[event.key];
      if (!move) return;
      event.preventDefault();
      this.moveTo(move[0], this.at[move[0]] + move[1]);
    });
    this.panes.push(pane);
    return figure;
  }

  moveTo(axis, index) {
    this.at[axis] = Math.max(0, Math.min(this.scan.size[axis] - 1, index));
    this.draw();
  }

  draw() {
    if (!this.scan || this.waiting) return;
    this.waiting = true; // once a frame, however many events there are
    requestAnimationFrame(() => {
      this.waiting = false;
      for (const pane of this.panes) this.drawPane(pane);
      this.tellPlace();
    });
  }

  tellPlace() {
    const [x, y, z] = this.at;
    const [nx, ny] = this.scan.size;
    const stored = this.voxels[(z * ny + y) * nx + x];
    const value = this.scan.slope * stored + this.scan.intercept;
    const kept = this.shown.filter((n) => n !== null && this.questions[n] && this.questions[n].mask[(z * ny + y) * nx + x]);
    const inside = kept.length ? `, kept for question ${kept.map((n) => n + 1).join(" and ")}` : "";
    if (this.reason) { // true of where the question points to, not of where the reader went
      this.reason.style.visibility = this.reason.at.every((n, axis) => n === this.at[axis]) ? "visible" : "hidden";
    }
    this.place.textContent = `voxel ${x}, ${y}, ${z}: ${+value.toPrecision(5)} ${this.scan.unit}${inside}`;
  }

  /* Values of a plane, rows from the top, as a function of (column, row). */
  indexer(plane) {
    const [nx, ny] = this.scan.size;
    const step = [1, nx, nx * ny];
    const columns = this.scan.size[plane.columns], rows = this.scan.size[plane.rows];
    const flip = plane.rows === 2;
    const start = this.at[plane.axis] * step[plane.axis] + (flip ? (rows - 1) * step[2] : 0);
    const down = flip ? -step[2] : step[plane.rows];
    return { columns, rows, start, across: step[plane.columns], down };
  }

  drawPane(pane) {
    const { plane, canvas } = pane;
    const grid = this.indexer(plane);
    const ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width || !height) return; // in a closed tab
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    const pixels = new ImageData(grid.columns, grid.rows);
    const { slope, intercept } = this.scan;
    const scale = 255 / (this.window[1] - this.window[0]);
    const gain = slope * scale, offset = (intercept - this.window[0]) * scale;
    const words = new Uint32Array(pixels.data.buffer);
    for (let row = 0, out = 0; row < grid.rows; row++) {
      for (let column = 0, i = grid.start + row * grid.down; column < grid.columns; column++, i += grid.across) {
        const grey = Math.max(0, Math.min(255, this.voxels[i] * gain + offset)) | 0;
        words[out++] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
      }
    }
    const plain = pane.plain || (pane.plain = document.createElement("canvas"));
    plain.width = grid.columns;
    plain.height = grid.rows;
    plain.getContext("2d").putImageData(pixels, 0, 0);
    const mmX = this.scan.spacing[plane.columns], mmY = this.scan.spacing[plane.rows];
    const room = 18; // pixels for the letters
    const fit = Math.min((width - 2 * room) / (grid.columns * mmX), (height - 2 * room) / (grid.rows * mmY));
    const scaleX = mmX * fit, scaleY = mmY * fit;
    const left = (width - grid.columns * scaleX) / 2, top = (height - grid.rows * scaleY) / 2;
    pane.drawn = { left, top, scaleX, scaleY, columns: grid.columns, rows: grid.rows };
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = "#000";
    context.fillRect(0, 0, width, height);
    context.imageSmoothingQuality = "high";
    context.drawImage(plain, left, top, grid.columns * scaleX, grid.rows * scaleY);
    if (this.outlines) this.drawOutlines(context, pane, grid);
    this.drawCross(context, pane, grid, width, height);
    const slice = this.at[plane.axis];
    pane.slider.value = slice;
    pane.title.textContent = `${pane.name} ${slice + 1} of ${this.scan.size[plane.axis]}`;
  }

  drawOutlines(context, pane, grid) {
    const { left, top, scaleX, scaleY } = pane.drawn;
    const first = this.shown[pane.row], second = this.shown[1 - pane.row];
    for (const [number, strength] of [[second, 1], [first, 2.5]]) {
      if (number === null || !this.questions[number]) continue;
      const mask = this.questions[number].mask;
      const at = (column, row) => column >= 0 && row >= 0 && column < grid.columns && row < grid.rows &&
        mask[grid.start + row * grid.down + column * grid.across];
      context.beginPath();
      for (let row = 0; row <= grid.rows; row++) {
        for (let column = 0; column <= grid.columns; column++) {
          const here = at(column, row);
          const x = left + column * scaleX, y = top + row * scaleY;
          if (here !== at(column, row - 1) && column < grid.columns && (here || at(column, row - 1))) {
            context.moveTo(x, y);
            context.lineTo(x + scaleX, y);
          }
          if (here !== at(column - 1, row) && row < grid.rows && (here || at(column - 1, row))) {
            context.moveTo(x, y);
            context.lineTo(x, y + scaleY);
          }
        }
      }
      context.lineCap = "square";
      context.strokeStyle = "rgba(0, 0, 0, 0.6)"; // a dark rim, so that the line is seen on bone
      context.lineWidth = strength + 2;
      context.stroke();
      context.strokeStyle = COLOURS[number % COLOURS.length];
      context.lineWidth = strength;
      context.stroke();
    }
  }

  drawCross(context, pane, grid, width, height) {
    const { left, top, scaleX, scaleY } = pane.drawn;
    const { plane } = pane;
    const line = plane.rows === 2 ? grid.rows - 1 - this.at[2] : this.at[plane.rows];
    const x = left + (this.at[plane.columns] + 0.5) * scaleX, y = top + (line + 0.5) * scaleY;
    const right = left + grid.columns * scaleX, bottom = top + grid.rows * scaleY, gap = 9;
    context.strokeStyle = "rgba(120, 220, 120, 0.75)";
    context.lineWidth = 1;
    context.beginPath();
    for (const [ax, ay, bx, by] of [[left, y, x - gap, y], [x + gap, y, right, y], [x, top, x, y - gap], [x, y + gap, x, bottom]]) {
      if (bx > ax || by > ay) {
        context.moveTo(ax, ay);
        context.lineTo(bx, by);
      }
    }
    context.stroke();
    context.fillStyle = "#fff";
    context.font = "13px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "center";
    const [west, east, north, south] = plane.sides;
    context.fillText(west, Math.max(9, left - 9), height / 2);
    context.fillText(east, Math.min(width - 9, right + 9), height / 2);
    context.fillText(north, width / 2, Math.max(9, top - 9));
    context.fillText(south, width / 2, Math.min(height - 9, bottom + 9));
  }
}

window.PhotonViewer = PhotonViewer;
