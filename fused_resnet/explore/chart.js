"use strict";
// Elements, numbers and charts: what page.js builds the page of.

// --- elements and numbers ------------------------------------------------------------------------------------------

const $ = id => document.getElementById(id);
const maker =
  namespace =>
  (tag, attributes = {}, ...children) => {
    const element = document.createElementNS(namespace, tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== undefined && value !== null && value !== false)
        element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat().filter(child => child !== null && child !== undefined));
    return element;
  };
const html = maker(document.documentElement.namespaceURI);
const svg = maker($("diagram").namespaceURI);

const NONE = "not recorded";
const KINDS = ["plain", "residual"];
const given = value => value !== null && value !== undefined;
/** A number of a record, which writes those that JSON has not as strings; undefined where there is none. */
const number = value =>
  given(value) ? Number({ inf: Infinity, "-inf": -Infinity, nan: NaN }[value] ?? value) : undefined;
const range = length => Array.from({ length }, (_, i) => i);
const distinct = values => [...new Set(values)];
const mean = values => (values.length ? values.reduce((a, b) => a + b) / values.length : undefined);
const superscript = exponent => [...String(exponent)].map(c => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("");

function short(value, digits = 3) {
  if (!given(value)) return NONE;
  if (Number.isNaN(value)) return "not a number";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e5)) {
    const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
    return `${mantissa} × 10${superscript(Number(exponent))}`;
  }
  return value === 0 ? "0" : value.toPrecision(Math.max(digits, Math.floor(Math.log10(size)) + 1));
}
const percent = value => (Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : short(value));
const count = value => (given(value) ? value.toLocaleString("en") : NONE);
/** A number as text, with the number itself for machines. */
const data = (value, format = short) => html("data", { value: given(value) ? value : "" }, format(value));

function table(caption, heads, rows) {
  const cells = row => row.map((cell, i) => (i ? html("td", {}, cell) : html("th", { scope: "row" }, cell)));
  return html(
    "table",
    {},
    html("caption", {}, caption),
    html(
      "thead",
      {},
      html(
        "tr",
        {},
        heads.map(head => html("th", { scope: "col" }, head)),
      ),
    ),
    html(
      "tbody",
      {},
      rows.map(row => html("tr", {}, cells(row))),
    ),
  );
}

// --- axes ----------------------------------------------------------------------------------------------------------

/** [low, high] around the values that an axis can show, on round numbers. */
function domain(values, log) {
  const shown = values.filter(v => Number.isFinite(v) && (!log || v > 0));
  if (!shown.length) return log ? [0.1, 1] : [0, 1];
  let low = Math.min(...shown),
    high = Math.max(...shown);
  if (log) {
    const round = (v, pick) => {
      const decade = 10 ** Math.floor(Math.log10(v));
      return decade * pick([1, 2, 5, 10], v / decade);
    };
    low = round(low, (steps, m) => steps.findLast(s => s <= m * (1 + 1e-9)) ?? 1);
    high = round(high, (steps, m) => steps.find(s => s >= m * (1 - 1e-9)) ?? 10);
    return low < high ? [low, high] : [low / 2, high * 2];
  }
  if (low === high) [low, high] = [low - 0.05 * (Math.abs(low) || 1), high + 0.05 * (Math.abs(high) || 1)];
  const step = stride(high - low);
  return [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];
}

function stride(span, most = 5) {
  const decade = 10 ** Math.floor(Math.log10(span / most));
  return decade * [1, 2, 5, 10].find(s => span / (s * decade) <= most * (1 + 1e-9));
}

function ticks([low, high], log) {
  if (!log) {
    const step = stride(high - low),
      first = Math.ceil(low / step - 1e-9);
    return range(Math.floor(high / step + 1e-9) - first + 1).map(i => (first + i) * step);
  }
  const first = Math.floor(Math.log10(low)),
    decades = Math.ceil(Math.log10(high)) - first;
  const steps = decades > 2 ? [1] : decades > 1 ? [1, 3] : [1, 2, 5],
    every = [1, 2, 5, 10, 20, 50].find(n => decades / n < 9) ?? 100;
  return range(decades + 1)
    .map(i => first + i)
    .filter(exponent => exponent % every === 0)
    .flatMap(exponent => steps.map(step => Number(`${step}e${exponent}`)))
    .filter(v => v >= low * (1 - 1e-9) && v <= high * (1 + 1e-9));
}

const logLabel = value => {
  const exponent = Math.floor(Math.log10(value) + 1e-9),
    digit = Math.round(value / 10 ** exponent);
  return Math.abs(exponent) < 3
    ? String(Number(value.toPrecision(1)))
    : `${digit > 1 ? `${digit}·` : ""}10${superscript(exponent)}`;
};

// --- charts --------------------------------------------------------------------------------------------------------

const INSET = 14; // room inside of the frame for what the scale cannot show: 0 on a log scale, inf, nan
const GLYPHS = { zero: "▽ zero", high: "△ infinite", nan: "× not a number" };

/**
 * A chart over positions 0 to n - 1. spec: {title, unit, x: {labels, short, groups, unit, title}, y: {domain, log, format},
 * series: [{kind, faint, values: per position a list over seeds}], style: "line" or "dots", marked: a position}.
 */
class Plot {
  constructor(id, { choose } = {}) {
    this.title = html("span", { class: "title" });
    this.unit = html("span", { class: "unit" });
    this.canvas = svg("svg", { tabindex: 0, role: "slider", "aria-orientation": "horizontal", "aria-valuemin": 1 });
    this.readout = html("p", { class: "readout", "aria-hidden": "true" });
    this.frame = html("div", { class: "canvas" }, this.canvas);
    $(id).append(html("figcaption", {}, this.title, " ", this.unit), this.frame, this.readout);
    this.at = null;
    this.canvas.addEventListener("pointermove", event => this.move(this.nearest(event)));
    this.canvas.addEventListener("pointerleave", () => this.move(null));
    this.canvas.addEventListener(
      "focus",
      () => this.canvas.matches(":focus-visible") && this.move(this.at ?? this.spec.marked ?? 0),
    );
    this.canvas.addEventListener("blur", () => this.move(null));
    this.canvas.addEventListener("keydown", event => this.key(event, choose));
    if (choose) this.canvas.addEventListener("click", event => choose(this.nearest(event)));
    this.canvas.classList.toggle("chooses", Boolean(choose));
    new ResizeObserver(() => this.spec && this.draw(false)).observe(this.frame);
  }

  show(spec, animate = false) {
    this.spec = spec;
    this.title.textContent = spec.title;
    this.unit.textContent = spec.unit;
    this.canvas.setAttribute("aria-label", `${spec.title}, by ${spec.x.title}`);
    this.canvas.setAttribute("aria-valuemax", spec.x.labels.length);
    if (this.at !== null) this.at = Math.min(this.at, spec.x.labels.length - 1);
    this.draw(animate);
  }

  key(event, choose) {
    const last = this.spec.x.labels.length - 1,
      at = this.at ?? 0;
    const to = {
      ArrowLeft: at - 1,
      ArrowDown: at - 1,
      ArrowRight: at + 1,
      ArrowUp: at + 1,
      Home: 0,
      End: last,
      PageUp: at + 10,
      PageDown: at - 10,
    }[event.key];
    if (to !== undefined) this.move(Math.max(0, Math.min(last, to)));
    else if (choose && (event.key === "Enter" || event.key === " ")) choose(at);
    else return;
    event.preventDefault();
  }

  x(i, n = this.spec.x.labels.length) {
    return n === 1 ? (this.left + this.right) / 2 : this.left + ((this.right - this.left) * i) / (n - 1);
  }

  y(value) {
    const {
        domain: [low, high],
        log,
      } = this.spec.y,
      top = this.top + INSET,
      bottom = this.bottom - INSET;
    if (Number.isNaN(value)) return this.bottom - 4;
    if (value === Infinity) return this.top + 7;
    if (log && value <= 0) return this.bottom - 4;
    const f = log ? Math.log10 : Number;
    return bottom - ((bottom - top) * (f(value) - f(low))) / (f(high) - f(low));
  }

  plotted(value) {
    return Number.isFinite(value) && (value > 0 || !this.spec.y.log);
  }

  nearest(event) {
    const n = this.spec.x.labels.length,
      along = event.clientX - this.canvas.getBoundingClientRect().left;
    return Math.max(0, Math.min(n - 1, Math.round(((along - this.left) / (this.right - this.left)) * (n - 1)))) || 0;
  }

  draw(animate) {
    const { x, y, series, style, missing } = this.spec,
      width = this.frame.clientWidth,
      height = this.frame.clientHeight;
    if (!width) return;
    const pad = style === "dots" ? 24 : 6;
    Object.assign(this, { left: 46 + pad, right: width - 8 - pad, top: 6, bottom: height - 38 });
    const axes = svg("g", { class: "axes" });
    for (const tick of ticks(y.domain, y.log)) {
      axes.append(
        svg("line", { x1: 46, x2: width - 8, y1: this.y(tick), y2: this.y(tick) }),
        svg("text", { x: 40, y: this.y(tick) + 4, "text-anchor": "end", "data-value": tick }, y.format(tick)),
      );
    }
    const apart = (this.right - this.left) / Math.max(1, x.labels.length - 1),
      every = [1, 2, 5, 10, 20, 50, 100].find(n => n * apart > 30) ?? 200;
    x.labels.forEach((label, i) => {
      if (x.short ? (i + 1) % every && (i || every * apart < 50) : false) return;
      axes.append(svg("text", { x: this.x(i), y: this.bottom + 16, "text-anchor": "middle" }, x.short?.[i] ?? label));
    });
    x.groups?.forEach((name, i, all) => {
      if (!name || name === all[i - 1]) return;
      const at = i ? this.x(i - 0.5) : this.left;
      if (i) axes.append(svg("line", { class: "group", x1: at, x2: at, y1: this.top, y2: this.bottom }));
      if (all.lastIndexOf(name) - i > 40 / apart) axes.append(svg("text", { x: at + 5, y: this.top + 9 }, name));
    });
    axes.append(
      svg("text", { x: width - 8, y: height - 5, "text-anchor": "end" }, `${x.title} →`),
      svg("line", { class: "base", x1: 46, x2: width - 8, y1: this.bottom, y2: this.bottom }),
    );
    this.cursor = svg("line", { class: "cursor", y1: this.top, y2: this.bottom });
    const mark =
      given(this.spec.marked) &&
      svg("line", {
        class: "marked",
        x1: this.x(this.spec.marked),
        x2: this.x(this.spec.marked),
        y1: this.top,
        y2: this.bottom,
      });
    const drawn = series.map((s, i) => this.series(s, style === "dots" ? 10 * i - 5 * (series.length - 1) : 0));
    if (animate) drawn.at(-1)?.classList.add("arrives");
    const said =
      missing && svg("text", { class: "absent", x: width / 2, y: height / 2 - 16, "text-anchor": "middle" }, NONE);
    this.rings = svg("g", { class: "rings" });
    this.canvas.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.canvas.replaceChildren(
      axes,
      ...(mark ? [mark] : []),
      this.cursor,
      ...drawn,
      this.rings,
      ...(said ? [said] : []),
    );
    this.move(this.at);
  }

  /** The path through positions; where a value cannot be drawn it breaks off, where there is none it goes on. */
  path(values, shift = 0) {
    let pen = "M";
    return values
      .map((v, i) => {
        if (!given(v)) return "";
        if (!this.plotted(v)) return ((pen = "M"), "");
        const step = `${pen}${(this.x(i) + shift).toFixed(2)} ${this.y(v).toFixed(2)}`;
        pen = "L";
        return step;
      })
      .join("");
  }

  series({ kind, faint, values }, shift) {
    const dots = this.spec.style === "dots",
      means = values.map(mean),
      seeds = Math.max(0, ...values.map(v => v.length));
    const group = svg("g", { class: `series ${kind}${faint ? " faint" : ""}`, "data-kind": kind });
    const dot = (i, v, r, name) => svg("circle", { class: name, cx: this.x(i) + shift, cy: this.y(v), r });
    if (dots) {
      group.append(svg("path", { class: "guide", d: this.path(means, shift) }));
      values.forEach((all, i) => {
        const shown = all.filter(v => this.plotted(v));
        if (shown.length > 1) {
          group.append(
            svg("line", {
              class: "spread",
              x1: this.x(i) + shift,
              x2: this.x(i) + shift,
              y1: this.y(Math.min(...shown)),
              y2: this.y(Math.max(...shown)),
            }),
          );
        }
        group.append(...shown.map(v => dot(i, v, 2.5, "seed")));
        if (this.plotted(means[i])) group.append(dot(i, means[i], 5, "mean"));
      });
    } else {
      if (seeds > 1) {
        const banded = range(values.length).filter(i => values[i].length && values[i].every(v => this.plotted(v)));
        const edge = (pick, order) =>
          order.map(i => `${this.x(i).toFixed(2)} ${this.y(pick(...values[i])).toFixed(2)}`);
        if (banded.length)
          group.append(
            svg("path", {
              class: "band",
              d: `M${[...edge(Math.max, banded), ...edge(Math.min, banded.toReversed())].join("L")}Z`,
            }),
          );
        group.append(...range(seeds).map(s => svg("path", { class: "seed", d: this.path(values.map(v => v[s])) })));
      }
      group.append(svg("path", { class: "mean", d: this.path(means) }));
      const r = means.length > 70 ? 1.8 : 2.6;
      if (seeds === 1 && means.length <= 200)
        group.append(...means.flatMap((v, i) => (given(v) && this.plotted(v) ? [dot(i, v, r, "point")] : [])));
    }
    values.forEach((all, i) =>
      all.forEach(v => {
        if (this.plotted(v)) return;
        const glyph = Number.isNaN(v) ? "×" : v === Infinity ? "△" : "▽";
        group.append(
          svg("text", { class: "glyph", x: this.x(i) + shift, y: this.y(v), "text-anchor": "middle" }, glyph),
        );
      }),
    );
    return group;
  }

  /** Shows the values at a position; null: the legend alone. */
  move(i) {
    this.at = i;
    const { x, y, series, hint, style } = this.spec,
      here = i !== null;
    const where = here ? `${x.labels[i]}${x.unit ?? ""}` : hint;
    const told = series
      .toReversed()
      .map(({ kind, values }) => ({ kind, all: values[i] ?? [], value: mean(values[i] ?? []) }));
    const spread = all => (all.length > 1 ? ` (${y.value(Math.min(...all))} to ${y.value(Math.max(...all))})` : "");
    this.readout.replaceChildren(
      html("span", { class: "where" }, where ?? ""),
      ...told.map(({ kind, all, value }) =>
        html(
          "span",
          { class: `key ${kind}` },
          kind,
          here ? " " : null,
          here ? data(value, y.value) : null,
          here ? spread(all) : null,
        ),
      ),
    );
    const text = told.map(({ kind, all, value }) => `${kind} ${y.value(value)}${spread(all)}`).join(", ");
    this.canvas.setAttribute("aria-valuenow", (i ?? 0) + 1);
    this.canvas.setAttribute("aria-valuetext", here ? `${where}: ${text}` : "arrow keys read the values");
    if (!this.cursor) return;
    this.cursor.setAttribute("visibility", here ? "visible" : "hidden");
    this.rings.replaceChildren();
    if (!here) return;
    this.cursor.setAttribute("x1", this.x(i));
    this.cursor.setAttribute("x2", this.x(i));
    if (style === "dots") return;
    this.rings.append(
      ...told
        .filter(t => given(t.value) && this.plotted(t.value))
        .map(t => svg("circle", { class: t.kind, cx: this.x(i), cy: this.y(t.value), r: 5 })),
    );
  }
}

/** What the glyphs on a chart's edges mean, for those that are there. */
function strange(values, log) {
  const found = {
    zero: log && values.some(v => v <= 0),
    high: values.includes(Infinity),
    nan: values.some(Number.isNaN),
  };
  const words = Object.keys(GLYPHS)
    .filter(name => found[name])
    .map(name => GLYPHS[name]);
  return words.length ? ` At the edge: ${words.join(", ")}.` : "";
}
