"use strict";
// Draws the charts: scales, grid, curves with bands between extremes, a cursor that follows pointer and arrow keys.
const charts = JSON.parse(document.getElementById("data").textContent);
// All charts have the same steps from left to right.
const spans = charts.flatMap(chart => chart.curves).filter(curve => curve.x.length).map(curve => [curve.x[0], curve.x[curve.x.length - 1]]);
const first = Math.min(...spans.map(span => span[0])), last = Math.max(...spans.map(span => span[1]));
const slider = document.getElementById("smoothing");
const SVG = "http://www.w3.org/2000/svg";
const LEFT = 52, RIGHT = 10, TOP = 8, BOTTOM = 24;

function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e4 || size < 1e-3) {
    const steps = [[1e9, "G"], [1e6, "M"], [1e3, "k"]];
    for (const [unit, letter] of steps) if (size >= unit) return +(value / unit).toPrecision(3) + letter;
    return value.toExponential(1).replace("e-", "e−");
  }
  return String(+value.toPrecision(3));
}

function exact(value) {
  const size = Math.abs(value);
  return size !== 0 && size < 1e-3 ? value.toExponential(3).replace("e-", "e−") : value.toLocaleString("en", { maximumSignificantDigits: 5 });
}

// Round numbers from low to high, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(m => m * power).find(size => size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(+(i * step).toPrecision(12));
  return found;
}

function logTicks(low, high) {
  const found = [], first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
  const factors = last - first > 3 ? [1] : last - first > 1 ? [1, 3] : [1, 2, 5];
  for (let power = first; power <= last; power++)
    for (const factor of factors) {
      const value = factor * 10 ** power;
      if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
    }
  if (last - first <= 3 || found.length < 7) return found;
  const every = Math.ceil(found.length / 6);
  return found.filter((_, i) => i % every === 0);
}

// Exponential moving average, without its bias to the first value.
function smoothed(values, weight) {
  if (weight === 0) return values;
  let mean = 0, sum = 0;
  return values.map(value => {
    mean = weight * mean + (1 - weight) * value;
    sum = weight * sum + (1 - weight);
    return mean / sum;
  });
}

class Chart {
  constructor(figure, data) {
    this.figure = figure;
    this.data = data;
    this.svg = figure.querySelector("svg");
    this.reading = figure.querySelector(".reading");
    this.button = figure.querySelector("button.log");
    this.resting = data.curves.map(curve => curve.last === null ? "–" : exact(curve.last));
    this.log = false;
    this.at = null;
    const low = Math.min(...data.curves.flatMap(curve => curve.low || curve.y));
    const high = Math.max(...data.curves.flatMap(curve => curve.high || curve.y));
    this.steps = [...new Set(data.curves.flatMap(curve => curve.x))].sort((a, b) => a - b);
    this.button.hidden = !(low > 0 && high >= 4 * low);
    this.button.setAttribute("aria-label", `Logarithmic axis of ${data.title}`);
    this.button.addEventListener("click", () => {
      this.log = !this.log;
      this.button.setAttribute("aria-pressed", String(this.log));
      this.draw();
    });
    this.svg.addEventListener("pointermove", event => this.follow(event));
    this.svg.addEventListener("pointerdown", event => this.follow(event));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    this.svg.addEventListener("blur", () => this.point(null));
    this.svg.addEventListener("keydown", event => this.step(event));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  draw() {
    const { width, height } = this.svg.getBoundingClientRect();
    if (!width || !this.steps.length) return;
    this.svg.replaceChildren();
    const weight = slider ? Number(slider.value) : 0;
    this.curves = this.data.curves.map(curve => ({ ...curve, shown: smoothed(curve.y, weight) }));
    this.scales(width, height, weight);
    this.grid(width, height);
    this.curves.forEach((curve, i) => {
      if (!curve.x.length) return;
      const style = i % 6;
      if (curve.low && !weight) {
        const up = curve.x.map((x, j) => `${this.x(x)},${this.y(curve.high[j])}`);
        const down = curve.x.map((x, j) => `${this.x(x)},${this.y(curve.low[j])}`).reverse();
        this.svg.append(element("polygon", { class: `band f${style}`, points: [...up, ...down].join(" ") }));
      }
      if (weight) this.svg.append(element("path", { class: `raw s${style}`, d: this.path(curve.x, curve.y) }));
      this.svg.append(element("path", { class: `curve s${style}`, d: this.path(curve.x, curve.shown) }));
      if (curve.x.length < 40)
        curve.x.forEach((x, j) => this.svg.append(element("circle", { class: `f${style}`, cx: this.x(x), cy: this.y(curve.shown[j]), r: 2.2 })));
    });
    this.cursor = element("g", {});
    this.svg.append(this.cursor);
    this.mark();
  }

  scales(width, height, weight) {
    const values = this.curves.flatMap(curve => weight ? curve.shown.concat(curve.y) : (curve.low || []).concat(curve.high || [], curve.y));
    let low = Math.min(...values), high = Math.max(...values);
    if (low === high) [low, high] = low ? [Math.min(0, 2 * low), Math.max(0, 2 * low)] : [-1, 1];
    const span = last - first || 1;
    const to = this.log ? Math.log : value => value;
    if (!this.log) {
      const pad = (high - low) * 0.05;
      low = low >= 0 && low - pad < 0 ? 0 : low - pad;
      high += pad;
    }
    const bottom = height - BOTTOM, tall = bottom - TOP, wide = width - LEFT - RIGHT;
    this.range = { low, high };
    this.x = step => +(LEFT + wide * (first === last ? 0.5 : (step - first) / span)).toFixed(1);
    this.y = value => +(bottom - tall * (to(value) - to(low)) / (to(high) - to(low))).toFixed(1);
  }

  grid(width, height) {
    const { low, high } = this.range;
    for (const value of this.log ? logTicks(low, high) : ticks(low, high, 4)) {
      const y = this.y(value);
      this.svg.append(element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }));
      this.svg.append(element("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, short(value)));
    }
    const steps = first === last ? [first] : ticks(first, last, Math.max(2, Math.floor(width / 110))).filter(Number.isInteger);
    for (const step of steps) {
      const x = this.x(step), edge = x > width - RIGHT - 24 ? "end" : "middle";
      this.svg.append(element("text", { x: edge === "end" ? width - RIGHT : x, y: height - 6, "text-anchor": edge }, short(step)));
    }
  }

  path(xs, ys) {
    return xs.map((x, i) => `${i ? "L" : "M"}${this.x(x)} ${this.y(ys[i])}`).join("");
  }

  follow(event) {
    const place = event.clientX - this.svg.getBoundingClientRect().left;
    let best = this.steps[0];
    for (const step of this.steps) if (Math.abs(this.x(step) - place) < Math.abs(this.x(best) - place)) best = step;
    this.point(best);
  }

  step(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const now = this.at === null ? this.steps.length : this.steps.indexOf(this.at);
    this.point(this.steps[Math.max(0, Math.min(this.steps.length - 1, now + moves[event.key]))]);
  }

  point(step) {
    if (step === this.at) return;
    this.at = step;
    this.mark();
  }

  mark() {
    const values = this.reading.querySelectorAll("b");
    if (!this.cursor) return;
    this.cursor.replaceChildren();
    let label = this.reading.querySelector(".at");
    if (this.at === null) {
      label?.remove();
      values.forEach((value, i) => { value.textContent = this.resting[i]; });
      return;
    }
    const x = this.x(this.at), { height } = this.svg.getBoundingClientRect();
    this.cursor.append(element("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: height - BOTTOM }));
    this.curves.forEach((curve, i) => {
      const j = curve.x.indexOf(this.at);
      values[i].textContent = j < 0 ? "–" : exact(curve.shown[j]);
      if (j >= 0) this.cursor.append(element("circle", { class: `f${i % 6}`, cx: x, cy: this.y(curve.shown[j]), r: 3.5 }));
    });
    if (!label) {
      label = document.createElement("span");
      label.className = "at";
      this.reading.prepend(label);
    }
    label.textContent = `step ${this.at.toLocaleString("en")}`;
  }
}

const drawn = [...document.querySelectorAll(".chart")].map(figure => new Chart(figure, charts[figure.dataset.chart]));
slider?.addEventListener("input", () => {
  slider.nextElementSibling.textContent = Number(slider.value) ? slider.value : "off";
  drawn.forEach(chart => chart.draw());
});
