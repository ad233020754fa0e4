"use strict";
// Sorting, filtering and plots of the report. Text only ever enters the page as textContent or as an attribute.
const DATA = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6fe8", "#8c8c8c"];
const SHAPES = [
  "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z", "M-4.5,-4.5H4.5V4.5H-4.5Z", "M0,-6L5.5,4.5H-5.5Z",
  "M0,-6.5L5.5,0L0,6.5L-5.5,0Z", "M0,6L5.5,-4.5H-5.5Z", "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
];
const UNITS = { params: ["parameters, M", 1e6], madds: ["multiply-adds, M", 1e6], latency_ms: ["latency, ms", 1] };
const colour = (i) => COLOURS[i % COLOURS.length];
const shape = (i) => SHAPES[(i + Math.floor(i / COLOURS.length)) % SHAPES.length];
const percent = (value) => (100 * value).toFixed(1);

function svg(tag, attributes, parent, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

function html(tag, attributes, parent, text) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.appendChild(node);
  return node;
}

// ---- tables
function sortBy(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const numeric = head.classList.contains("number");
  const before = head.getAttribute("aria-sort");
  const direction = before === "none" ? (numeric ? "descending" : "ascending") : before === "ascending" ? "descending" : "ascending";
  for (const cell of table.tHead.rows[0].cells) if (cell.hasAttribute("aria-sort")) cell.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", direction);
  const sign = direction === "ascending" ? 1 : -1;
  const value = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const rows = [...table.tBodies[0].rows];
  rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === "" || y === "") return (x === "") - (y === ""); // what is not known comes last
    return sign * (numeric ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true }));
  });
  table.tBodies[0].append(...rows);
}

function filterRows(table, words, count) {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !wanted.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  count.textContent = `${shown} of ${table.tBodies[0].rows.length} rows`;
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, column) => {
    cell.querySelector("button")?.addEventListener("click", () => sortBy(table, column));
  });
  const input = document.getElementById(`filter-${table.id}`);
  const count = document.getElementById(`count-${table.id}`);
  input.addEventListener("input", () => filterRows(table, input.value, count));
  filterRows(table, input.value, count);
}

// ---- the tip beside what is pointed at or focused
const tip = html("div", { id: "tip", role: "status", hidden: "" }, document.body);
function showTip(node, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = node.getBoundingClientRect();
  const left = Math.min(box.left + box.width / 2 + 12, innerWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 8;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 8 ? above : Math.min(box.bottom + 8, innerHeight - tip.offsetHeight - 8)}px`;
}
function tipOn(node, text) {
  node.setAttribute("tabindex", "0");
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", text);
  for (const event of ["mouseenter", "focus"]) node.addEventListener(event, () => showTip(node, text));
  for (const event of ["mouseleave", "blur"]) node.addEventListener(event, () => (tip.hidden = true));
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

// ---- axes
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted || 1;
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((k) => k * base).find((k) => k >= raw);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}
function span(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = (high - low || Math.abs(high) || 1) * 0.08;
  return [low - pad, high + pad];
}
const widthOf = (holder) => Math.max(280, Math.min(760, holder.clientWidth || 520)); // so that type keeps its size
function axes(holder, label, xs, ys, xTitle, yTitle) {
  const [W, H, L, R, T, B] = [widthOf(holder), 330, 52, 14, 10, 42];
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": label }, holder);
  const x = (v) => L + ((v - xs[0]) / (xs[1] - xs[0])) * (W - L - R);
  const y = (v) => H - B - ((v - ys[0]) / (ys[1] - ys[0])) * (H - T - B);
  for (const v of ticks(ys[0], ys[1], 5)) {
    svg("line", { class: "axis", x1: L, x2: W - R, y1: y(v), y2: y(v) }, root);
    svg("text", { x: L - 6, y: y(v) + 4, "text-anchor": "end" }, root, String(v));
  }
  for (const v of ticks(xs[0], xs[1], W < 400 ? 4 : 6)) {
    svg("line", { class: "axis", x1: x(v), x2: x(v), y1: H - B, y2: H - B + 4 }, root);
    svg("text", { x: x(v), y: H - B + 17, "text-anchor": "middle" }, root, String(v));
  }
  svg("text", { x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle" }, root, xTitle);
  svg("text", { transform: `translate(13 ${(T + H - B) / 2}) rotate(-90)`, "text-anchor": "middle" }, root, yTitle);
  return { root, x, y, right: W - R, left: L, top: T, bottom: H - B };
}
function menu(tools, label, options, changed) {
  const wrap = html("label", {}, tools, `${label} `);
  const select = html("select", {}, wrap);
  for (const [value, text] of options) html("option", { value }, select, text);
  select.addEventListener("change", changed);
  return select;
}
function legend(holder, rows, used) {
  const list = html("ul", { class: "legend" }, holder);
  for (const i of used) {
    const item = html("li", {}, list);
    const icon = svg("svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" }, item);
    svg("path", { d: shape(i), fill: colour(i), class: "mark" }, icon);
    item.append(rows[i].name);
  }
}

// ---- metric against cost
function drawFront(table, figure) {
  const tools = html("div", { class: "tools" }, figure);
  const holder = html("div", {}, figure);
  const draw = () => {
    holder.replaceChildren();
    const [metric, cost] = [metricMenu.value, costMenu.value];
    const [title, divisor] = UNITS[cost];
    const points = table.rows.map((row, i) => ({ i, row, stat: row.stats[metric], cost: row[cost] }))
      .filter((p) => p.stat && p.cost !== null)
      .map((p) => ({ ...p, x: p.cost / divisor, y: 100 * p.stat[0], sd: p.stat[1] === null ? null : 100 * p.stat[1] }));
    if (!points.length) return void html("p", { class: "soft" }, holder, "nothing measured");
    const frame = axes(holder, `${metric} against ${title}`, span(points.map((p) => p.x)),
      span(points.flatMap((p) => [p.y - (p.sd ?? 0), p.y + (p.sd ?? 0)])), title, `${metric}, %`);
    const front = new Set(table.fronts[metric]?.[cost] ?? []);
    const best = points.filter((p) => front.has(p.i)).sort((a, b) => a.x - b.x || a.y - b.y);
    svg("path", { class: "front", d: best.map((p, k) => k ? `H${frame.x(p.x)}V${frame.y(p.y)}` : `M${frame.x(p.x)},${frame.y(p.y)}`).join("") }, frame.root);
    for (const p of points) {
      const mark = svg("g", { class: "point" }, frame.root);
      const [x, y] = [frame.x(p.x), frame.y(p.y)];
      if (p.sd) svg("line", { class: "spread", x1: x, x2: x, y1: frame.y(p.y - p.sd), y2: frame.y(p.y + p.sd) }, mark);
      svg("path", { class: "mark", d: shape(p.i), fill: colour(p.i), transform: `translate(${x} ${y})` }, mark);
      const spread = p.sd === null ? "" : ` ± ${p.sd.toFixed(1)}`;
      tipOn(mark, `${p.row.name}\n${metric} ${p.y.toFixed(1)}${spread} % (n=${p.stat[2]})\n${title} ${p.x.toPrecision(4)}` +
        (cost === "latency_ms" && table.latency ? `\n${table.latency}` : "") + (front.has(p.i) ? "\non the Pareto front" : ""));
    }
    nameFront(frame, best, points);
    legend(holder, table.rows, points.map((p) => p.i));
  };
  const metricMenu = menu(tools, "metric", table.metrics.map((m) => [m, m]), draw);
  const costs = Object.keys(UNITS).filter((c) => table.rows.some((row) => row[c] !== null)).reverse();
  const costMenu = menu(tools, "against", costs.map((c) => [c, UNITS[c][0]]), draw);
  draw();
  return draw;
}
function nameFront(frame, best, points) {
  const taken = points.map((p) => [frame.x(p.x) - 7, frame.y(p.y) - 7, frame.x(p.x) + 7, frame.y(p.y) + 7]);
  for (const p of best.slice(0, 12)) {
    const name = p.row.name.length > 26 ? p.row.name.slice(0, 25) + "…" : p.row.name;
    const wide = name.length * 6.6;
    const [x, y] = [frame.x(p.x), frame.y(p.y)];
    for (const [left, base] of [[x + 7, y - 9], [x - wide - 7, y - 9], [x - wide - 10, y + 4], [x + 10, y + 4], [x + 7, y + 18], [x - wide - 7, y + 18]]) {
      const box = [left, base - 11, left + wide, base + 3];
      const inside = box[0] >= frame.left && box[2] <= frame.right && box[1] >= frame.top && box[3] <= frame.bottom;
      if (!inside || taken.some((o) => box[0] < o[2] && o[0] < box[2] && box[1] < o[3] && o[1] < box[3])) continue;
      svg("text", { class: "halo", x: left, y: base, "aria-hidden": "true" }, frame.root, name);
      taken.push(box);
      break;
    }
  }
}

// ---- learning curves
function drawCurves(table, figure) {
  const names = [...new Set(table.curves.flatMap((run) => Object.keys(run.series)))].sort((a, b) => b.startsWith("val/") - a.startsWith("val/"));
  const tools = html("div", { class: "tools" }, figure);
  const holder = html("div", {}, figure);
  const draw = () => {
    holder.replaceChildren();
    const name = select.value;
    const scale = name.startsWith("val/") ? 100 : 1;
    const runs = table.curves.filter((run) => run.series[name]);
    const all = runs.flatMap((run) => run.series[name]);
    const frame = axes(holder, `${name} over training`, span(all.map((p) => p[0])), span(all.map((p) => p[1] * scale)), "step", scale === 100 ? `${name}, %` : name);
    for (const run of runs) {
      const line = svg("g", { class: "run" }, frame.root);
      const d = run.series[name].map((p, k) => `${k ? "L" : "M"}${frame.x(p[0]).toFixed(1)},${frame.y(p[1] * scale).toFixed(1)}`).join("");
      const look = { d, class: "curve", stroke: colour(run.row) };
      const dash = ["", "7 3", "2 3", "9 3 2 3"][Math.floor(run.row / COLOURS.length) % 4];
      svg("path", dash ? { ...look, "stroke-dasharray": dash } : look, line);
      svg("path", { d, class: "hit" }, line);
      const last = run.series[name].at(-1);
      svg("path", { class: "mark", d: shape(run.row), fill: colour(run.row), transform: `translate(${frame.x(last[0])} ${frame.y(last[1] * scale)})` }, line);
      tipOn(line, `${table.rows[run.row].name}, seed ${run.seed}\n${name} ${(last[1] * scale).toPrecision(4)} at step ${last[0]}`);
    }
    legend(holder, table.rows, [...new Set(runs.map((run) => run.row))]);
  };
  const select = menu(tools, "curve of", names.map((n) => [n, n]), draw);
  draw();
  return draw;
}

// ---- bars, one a class
function drawBars(table, figure) {
  const tools = html("div", { class: "tools" }, figure);
  const holder = html("div", {}, figure);
  const rows = table.rows.map((row, i) => [i, row.name]).filter(([i]) => table.per_class.some((task) => task.values[i]));
  const draw = () => {
    holder.replaceChildren();
    const task = table.per_class[Number(taskMenu.value)];
    const [a, b] = [task.values[rowMenu.value], otherMenu.value === "" ? null : task.values[otherMenu.value]];
    if (!a) return void html("p", { class: "soft" }, holder, "no scores by class");
    const [W, step] = [widthOf(holder), 22];
    const L = Math.min(150, W * 0.34);
    const root = svg("svg", { viewBox: `0 0 ${W} ${task.classes.length * step + 8}`, role: "group", "aria-label": "score by class" }, holder);
    const x = (v) => L + v * (W - L - 50);
    const order = task.classes.map((_, k) => k).sort((m, n) => (a[n] ?? -1) - (a[m] ?? -1));
    order.forEach((k, line) => {
      const bar = svg("g", { class: "bar" }, root);
      const y = line * step + 4;
      const name = task.classes[k].length * 7 > L ? task.classes[k].slice(0, L / 7 - 1) + "…" : task.classes[k];
      svg("text", { x: L - 6, y: y + 13, "text-anchor": "end" }, bar, name);
      svg("rect", { class: "mark", x: L, y, width: Math.max(0, x(a[k] ?? 0) - L), height: step - 6, fill: colour(Number(rowMenu.value)) }, bar);
      svg("text", { x: W - 4, y: y + 13, "text-anchor": "end" }, bar, a[k] === null ? "none" : percent(a[k]));
      if (b && b[k] !== null) svg("path", { class: "mark", d: shape(3), fill: colour(Number(otherMenu.value)), transform: `translate(${x(b[k])} ${y + 8})` }, bar);
      tipOn(bar, `${task.classes[k]}\n${table.rows[rowMenu.value].name}: ${a[k] === null ? "none" : percent(a[k]) + " %"}` +
        (b ? `\n${table.rows[otherMenu.value].name}: ${b[k] === null ? "none" : percent(b[k]) + " %"}` : ""));
    });
  };
  const taskMenu = menu(tools, "task", table.per_class.map((task, k) => [k, task.task]), draw);
  taskMenu.parentElement.hidden = table.per_class.length < 2;
  const rowMenu = menu(tools, "bars", rows, draw);
  const otherMenu = menu(tools, "diamonds", [["", "nothing"], ...rows], draw);
  if (rows.length > 1) otherMenu.value = rows[1][0];
  draw();
  return draw;
}

const redraws = [];
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) for (const redraw of redraws) redraw();
  width = innerWidth;
});
DATA.tables.forEach((table, i) => {
  for (const [kind, draw] of [["front", drawFront], ["curves", drawCurves], ["bars", drawBars]]) {
    const figure = document.getElementById(`${kind}-${i}`);
    if (figure) redraws.push(draw(table, figure));
  }
});

// ---- a link to a run opens it
function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) target.open = true;
}
addEventListener("hashchange", openTarget);
openTarget();
