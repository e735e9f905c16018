// Curves: each panel is drawn as SVG from the data block, anew when its size or a control changes.
const SVG = "http://www.w3.org/2000/svg";
const PLACE = { left: 46, right: 8, top: 8, bottom: 22 }; // margins around the curves, in pixels
const DOTS_BELOW = 40; // points; few ones are drawn with dots, or a run of one step would be invisible
const bar = document.querySelector(".bar");
let runBoxes = Array.from(document.querySelectorAll("input.run"));

const colour = (run) => `c${(run + 1) % 6}`;
const isShown = (run) => runBoxes[run]?.checked ?? true;
const axis = () => byId("axis").value;

function draw(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function format(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return `${Number((value / 1e9).toPrecision(3))}B`;
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  return size > 0 && size < 1e-3 ? value.toExponential(1).replace("e-", "e\u2212") : String(Number(value.toPrecision(4)));
}

// Mean over the points around each one; the window is cut off at both ends.
function smooth(values, half) {
  const sums = [0];
  for (const value of values) sums.push(sums.at(-1) + value);
  return values.map((_, i) => {
    const start = Math.max(0, i - half);
    const stop = Math.min(values.length, i + half + 1);
    return (sums[stop] - sums[start]) / (stop - start);
  });
}

// About `count` round numbers between the two ends: steps of 1, 2 or 5 times a power of ten; 1, 2, 5 themselves if logarithmic.
function ticks(low, high, count, logarithmic, whole) {
  const found = [];
  if (logarithmic) {
    const leaps = high / low > 1e4 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const leap of leaps) found.push(leap * 10 ** power);
    }
    return found.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  }
  const rough = (high - low || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = power * [1, 2, 5, 10].find((leap) => leap * power >= rough * 0.8);
  if (whole) step = Math.max(1, Math.round(step));
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

// The curves of a panel that are shown: { run, name, points: [[x, y]...], raw, dots }.
function curvesOf(panel) {
  const half = Number(byId("smoothing").value);
  const curves = [];
  data.runs.forEach(({ label, curves: own }, run) => {
    if (!isShown(run)) return;
    for (const validation of [false, true]) {
      const curve = own[validation ? `val_${panel.key}` : panel.key];
      if (!curve) continue;
      const xs = curve[axis()];
      const span = Math.max(1, Math.round((half * curve.y.length) / 200)); // 1 of the slider: 1% of the curve
      const smooths = half > 0 && !validation && panel.key !== "lr" && curve.y.length > 3;
      const ys = smooths ? smooth(curve.y, span) : curve.y;
      const pair = (values) => values.map((y, i) => [xs[i], y]);
      const name = validation ? `${label}, validation` : label;
      curves.push({ run, name, validation, points: pair(ys), raw: smooths ? pair(curve.y) : null, dots: curve.y.length <= DOTS_BELOW });
    }
  });
  return curves;
}

function scales(panel, curves, width, height) {
  const points = curves.flatMap((curve) => [...curve.points, ...(curve.raw ?? [])]);
  const ys = points.map((point) => point[1]);
  const xs = points.map((point) => point[0]);
  const min = (values) => values.reduce((a, b) => Math.min(a, b), Infinity); // not Math.min(...values): 100,000 arguments
  const max = (values) => -min(values.map((value) => -value));
  let [low, high] = [min(ys), max(ys)];
  const wanted = byId("logarithmic").checked || (panel.log && high > 20 * low);
  const logarithmic = wanted && low > 0;
  if (!logarithmic) {
    if (panel.zero && low >= 0) low = 0;
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    [low, high] = [low === 0 && panel.zero ? 0 : low - room, high + room];
  } else if (low === high) [low, high] = [low / 2, high * 2];
  let [first, last] = [min(xs), max(xs)];
  if (first === last) [first, last] = [first - 1, last + 1]; // a single step stands in the middle
  const value = logarithmic ? Math.log : (y) => y;
  const share = (y) => (value(y) - value(low)) / (value(high) - value(low));
  return {
    logarithmic, low, high, first, last,
    x: (at) => PLACE.left + ((at - first) / (last - first)) * (width - PLACE.left - PLACE.right),
    y: (at) => height - PLACE.bottom - share(at) * (height - PLACE.top - PLACE.bottom),
  };
}

function line(points, scale, classes) {
  const path = points.map(([x, y], i) => `${i ? "L" : "M"}${scale.x(x).toFixed(1)} ${scale.y(y).toFixed(1)}`).join("");
  return draw("path", { class: classes, d: path });
}

function drawPanel(box) {
  const { panel, element, svg } = box;
  const width = svg.clientWidth;
  const height = element.classList.contains("wide") ? 300 : 190;
  box.curves = curvesOf(panel);
  element.hidden = box.curves.length === 0;
  if (element.hidden || width === 0) return;
  const scale = (box.scale = scales(panel, box.curves, width, height));
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  const parts = [];
  for (const y of ticks(scale.low, scale.high, height / 45, scale.logarithmic)) {
    parts.push(draw("line", { class: "grid", x1: PLACE.left, x2: width - PLACE.right, y1: scale.y(y), y2: scale.y(y) }));
    parts.push(draw("text", { x: PLACE.left - 6, y: scale.y(y) + 4, "text-anchor": "end" }, format(y)));
  }
  for (const x of ticks(scale.first, scale.last, width / 80, false, true)) {
    const end = scale.x(x) > width - 24 ? "end" : "middle";
    parts.push(draw("text", { x: scale.x(x), y: height - 6, "text-anchor": end }, format(x)));
  }
  for (const curve of box.curves) {
    const group = draw("g", { class: colour(curve.validation && data.runs.length === 1 ? 2 : curve.run) });
    if (curve.raw) group.append(line(curve.raw, scale, "curve raw"));
    group.append(line(curve.points, scale, curve.validation ? "curve validation" : "curve"));
    const dot = ([x, y]) => draw("circle", { class: curve.validation ? "hollow" : "", cx: scale.x(x), cy: scale.y(y), r: 2.6 });
    if (curve.dots) group.append(...curve.points.map(dot));
    parts.push(group);
  }
  box.cursor = draw("line", { class: "cursor", y1: PLACE.top, y2: height - PLACE.bottom, visibility: "hidden" });
  svg.replaceChildren(...parts, box.cursor);
  readOut(box, null);
}

// The values at a place of the horizontal axis, or how the curves end (null).
function readOut(box, at) {
  const parts = box.curves.map((curve) => {
    const near = ([x]) => Math.abs(x - at);
    const point = at === null ? curve.points.at(-1) : curve.points.reduce((a, b) => (near(b) < near(a) ? b : a));
    const where = at !== null && point[0] !== at ? ` (${format(point[0])})` : "";
    const shade = colour(curve.validation && data.runs.length === 1 ? 2 : curve.run);
    const kind = curve.validation ? "validation" : "training";
    const name = data.runs.length > 1 ? curve.name : box.curves.length > 1 ? kind : "";
    return make("span", { class: shade }, make("b", {}, name), ` ${Number(point[1].toPrecision(5))}${where}`);
  });
  const unit = axis() === "x" ? "step" : "tokens";
  box.readout.replaceChildren(make("span", {}, at === null ? "at the end" : `${unit} ${at.toLocaleString("en")}`), ...parts);
}

function follow(box, event) {
  if (!box.scale) return;
  const x = event.clientX - box.svg.getBoundingClientRect().left;
  const near = ([at]) => Math.abs(box.scale.x(at) - x);
  const [at] = box.curves.flatMap((curve) => curve.points).reduce((a, b) => (near(b) < near(a) ? b : a));
  box.cursor.setAttribute("x1", box.scale.x(at));
  box.cursor.setAttribute("x2", box.scale.x(at));
  box.cursor.setAttribute("visibility", "visible");
  readOut(box, at);
}

let boxes = [];
const drawAll = () => boxes.forEach(drawPanel);
const sizes = new ResizeObserver(drawAll);

function makePanels() {
  sizes.disconnect();
  boxes = data.panels.map((panel, number) => {
    const svg = draw("svg", { role: "img", "aria-label": panel.title });
    const readout = make("p", { class: "readout" });
    const element = make("section", { class: number === 0 ? "panel wide" : "panel" }, make("h2", {}, panel.title), readout, svg);
    const box = { panel, element, svg, readout, curves: [], scale: null };
    svg.addEventListener("pointermove", (event) => follow(box, event));
    svg.addEventListener("pointerleave", () => {
      box.cursor?.setAttribute("visibility", "hidden");
      if (box.scale) readOut(box, null);
    });
    return box;
  });
  byId("panels").replaceChildren(...boxes.map((box) => box.element));
  sizes.observe(byId("panels"));
  drawAll();
}

function watchRuns() {
  runBoxes = Array.from(document.querySelectorAll("input.run"));
  for (const box of runBoxes) {
    box.hidden = runBoxes.length === 1;
    box.onchange = () => {
      if (!runBoxes.some((each) => each.checked)) box.checked = true; // one run stays
      drawAll();
    };
  }
}

Object.assign(keys, {
  l: () => byId("logarithmic").click(),
  x: () => {
    byId("axis").value = axis() === "x" ? "t" : "x";
    drawAll();
  },
});
for (let number = 1; number < 10; number++) keys[number] = () => runBoxes[number - 1]?.click();
byId("axis").addEventListener("change", drawAll);
byId("logarithmic").addEventListener("change", drawAll);
byId("smoothing").addEventListener("input", () => {
  const share = Number(byId("smoothing").value);
  byId("window").textContent = share ? `${share}%` : "off";
  drawAll();
});
const longest = Math.max(0, ...data.runs.map(({ curves }) => curves.loss?.y.length ?? 0));
if (longest > 200) byId("smoothing").value = 1; // shorter curves are readable as they are
byId("window").textContent = longest > 200 ? "1%" : "off";
bar.hidden = false;
watchRuns();
makePanels();
