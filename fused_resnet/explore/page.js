// The page: gradients, depths, NumPy.

// --- the gradient --------------------------------------------------------------------------------------------------

const gradientPlot = new Plot("gradient-plot");

function norms(stack, of) {
  if (!stack) return { names: [], values: [] };
  if (of === "blocks") {
    const values = (stack.block_grad_norm ?? []).map(number);
    const named = distinct(stack.layers.flatMap(name => name.match(/^layer\d+\.\d+/)?.[0] ?? []));
    return { names: values.map((_, i) => (named.length === values.length ? named[i] : `block ${i + 1}`)), values };
  }
  return { names: stack.layers, values: stack.weight_grad_norm.map(number) };
}

/** Names of both networks in order: a projection is a layer that the plain network has not. */
function merge(a, b) {
  const [long, other] = a.length >= b.length ? [a, b] : [b, a];
  const known = new Set(long);
  return [...long, ...other.filter(name => !known.has(name))];
}

function showGradient(animate = true) {
  const { of, ...wanted } = state.gradient,
    kind = state.on ? "residual" : "plain",
    other = state.on ? "plain" : "residual";
  const stack = Object.fromEntries(KINDS.map(k => [k, matching(stacks, k, wanted)[0]]));
  const found = Object.fromEntries(KINDS.map(k => [k, norms(stack[k], of)]));
  const names = merge(found.residual.names, found.plain.names);
  const along = ({ names: own, values }) => {
    const at = new Map(own.map((name, i) => [name, values[i]]));
    return names.map(name => (at.has(name) ? [at.get(name)] : []));
  };
  const all = stacks.filter(s => s.block === wanted.block && s.step === wanted.step).flatMap(s => norms(s, of).values);
  gradientPlot.show(
    {
      title: of === "blocks" ? "Gradient at the input of each block" : "Gradient of each layer’s weights",
      unit: "2-norm, log scale",
      x: {
        labels: names,
        short: names.map((_, i) => i + 1),
        groups: names.map(name => name.match(/^layer\d+/)?.[0]),
        title: of === "blocks" ? "block, from the input" : "layer, from the input",
      },
      y: { domain: domain(all, true), log: true, format: logLabel, value: short },
      series: [other, kind].map(k => ({ kind: k, faint: k === other, values: along(found[k]) })),
      style: "line",
      missing: !found[kind].values.length,
      hint: "hover, or focus and use the arrow keys",
    },
    animate,
  );

  const values = found[kind].values,
    first = values[0],
    last = values.at(-1);
  const facts = [
    ["first " + (of === "blocks" ? "block" : "layer"), data(first)],
    ["last " + (of === "blocks" ? "block" : "layer"), data(last)],
    ["first ÷ last", data(values.length ? first / last : undefined)],
    ["loss", data(number(stack[kind]?.loss))],
  ];
  $("gradient-facts").className = `facts ${kind}`;
  $("gradient-facts").replaceChildren(
    ...facts.map(([term, what]) => html("div", {}, html("dt", {}, term), html("dd", {}, what))),
  );

  const place = of === "blocks" ? "block" : "layer",
    ratio = k => `${short(found[k].values[0] / found[k].values.at(-1))} times`;
  $("gradient-verdict").textContent = KINDS.every(k => found[k].values.length)
    ? `Without the shortcut the first ${place}’s gradient is ${ratio("plain")} the last ${place}’s; with it, ${ratio("residual")}.`
    : "";

  const said = [
    `${wanted.depth} layers`,
    wanted.block && `${wanted.block} blocks`,
    wanted.activation && `${wanted.activation}-activation`,
    nameOf("step", wanted.step),
    `a batch of ${stack[kind]?.batch ?? stack[other]?.batch ?? gradients.batch ?? NONE}`,
  ]
    .filter(Boolean)
    .join(", ");
  const absent = KINDS.filter(k => !found[k].values.length)
    .map(k => ` The ${k} network is ${NONE} for this choice.`)
    .join("");
  $("gradient-note").textContent =
    `${said}. The scale stays when you switch; the other network stays in the background.${absent}${strange(
      Object.values(found).flatMap(f => f.values),
      true,
    )}`;
  const row = i => [names[i], ...KINDS.map(k => data(along(found[k])[i][0], v => short(v, 4)))];
  $("gradient-table").replaceChildren(
    table(
      `Gradient norms: ${said}`,
      ["layer", "plain", "residual"],
      names.map((_, i) => row(i)),
    ),
  );
  showBlock(wanted, animate);
  $("shortcut").checked = state.on;
  controls.gradient.forEach(control => control.set(state.gradient[control.field]));
  if (animate)
    $("status").textContent =
      `Shortcut ${state.on ? "on" : "off"}. First layer ${short(first)}, last layer ${short(last)}.`;
}

/** The block as it is wired: layers from x down to y, the shortcut around them. */
function showBlock({ block, activation, shortcut }, animate) {
  const convolutions = block === "bottleneck" ? ["1×1 conv", "3×3 conv", "1×1 conv"] : ["3×3 conv", "3×3 conv"];
  const branch =
    activation === "pre"
      ? convolutions.flatMap(conv => ["batch norm", "ReLU", conv])
      : convolutions.flatMap((conv, i) => [conv, "batch norm", ...(i + 1 < convolutions.length ? ["ReLU"] : [])]);
  const tail = activation === "pre" ? [] : ["ReLU"];
  const rows = branch.length + 1 + tail.length,
    pitch = 308 / rows,
    center = i => 48 + pitch * (i + 0.5),
    X = 72,
    WIRE = 172;
  const size = Math.min(30, pitch - 9),
    plus = center(branch.length);
  const box = (name, i) =>
    svg(
      "g",
      { class: `box ${name === "ReLU" ? "relu" : name.endsWith("conv") ? "conv" : "norm"}` },
      svg("rect", { x: X - 52, y: center(i) - size / 2, width: 104, height: size, rx: 6 }),
      svg("text", { x: X, y: center(i) + 4.5, "text-anchor": "middle" }, name),
    );
  const trunk = `M${X} 366V26`; // as the gradient goes: from y back to x
  const around = `M${X} ${plus}H${WIRE - 14}Q${WIRE} ${plus} ${WIRE} ${plus - 14}V50Q${WIRE} 36 ${WIRE - 14} 36H${X}`;
  const head = (x, y, turn) =>
    svg("path", { class: "head", d: "M0 0l-4.5 -9h9z", transform: `translate(${x} ${y}) rotate(${turn})` });
  const ends = svg(
    "g",
    { class: "ends" },
    svg("text", { x: X, y: 19, "text-anchor": "middle" }, "x"),
    svg("text", { x: X, y: 384, "text-anchor": "middle" }, "y"),
  );
  const wires = [svg("path", { class: "wire", d: trunk }), svg("path", { class: "flow", d: trunk }), head(X, 369, 0)];
  const skip = svg(
    "g",
    { class: "skip" },
    svg("path", { class: "wire", d: around }),
    svg("path", { class: "flow", d: around }),
    svg(
      "text",
      { transform: `translate(${WIRE + 17} ${(plus + 36) / 2}) rotate(-90)`, "text-anchor": "middle" },
      "+ x",
    ),
    svg("circle", { cx: X, cy: plus, r: 12 }),
    head(X + 13, plus, 90),
    svg("path", { class: "plus", d: `M${X - 6} ${plus}h12M${X} ${plus - 6}v12` }),
  );
  const diagram = $("diagram");
  diagram.replaceChildren(
    ...wires,
    skip,
    ...branch.map(box),
    ...tail.map((name, i) => box(name, branch.length + 1 + i)),
    ends,
  );
  diagram.setAttribute("class", `${state.on ? "residual" : "plain"}${animate ? " flowing" : ""}`);
  const wiring = state.on
    ? `; the shortcut carries x around all of it, and is added ${tail.length ? "before the last ReLU" : "at the end, with no ReLU after it"}`
    : "; no shortcut";
  diagram.setAttribute(
    "aria-label",
    `${state.on ? "Residual" : "Plain"} block, ${activation ?? "post"}-activation: ${[...branch, ...tail].join(", ")}${wiring}`,
  );
  $("formula").replaceChildren(
    "∂",
    html("i", {}, "L"),
    "/∂",
    html("i", {}, "x"),
    " = ∂",
    html("i", {}, "L"),
    "/∂",
    html("i", {}, "y"),
    " · ",
    html(
      "span",
      { class: "factor" },
      ...(state.on
        ? ["(", html("b", {}, "1 + "), "∂", html("i", {}, "F"), "/∂", html("i", {}, "x"), ")"]
        : ["∂", html("i", {}, "F"), "/∂", html("i", {}, "x")]),
    ),
  );
}

// --- the depth -----------------------------------------------------------------------------------------------------

// The final loss: of all training images after the last epoch, if that is recorded.
const fitted = runs.every(run => run.train_loss_eval?.length);
const LOSS = fitted ? "train_loss_eval" : "train_loss";
const AXES = {
  loss: { log: true, format: logLabel, value: short },
  accuracy: { log: false, format: v => `${Number((100 * v).toFixed(1))} %`, value: percent },
};

function choose(i) {
  state.training.depth = recorded("training")[i];
  write();
  showDepth();
}

const plots = {
  loss: new Plot("loss-plot", { choose }),
  lossCurve: new Plot("loss-curve"),
  accuracy: new Plot("accuracy-plot", { choose }),
  accuracyCurve: new Plot("accuracy-curve"),
};

function showDepth(announce = true) {
  const { depth, ...wanted } = state.training,
    depths = recorded("training"),
    index = Math.max(0, depths.indexOf(depth));
  const at = (kind, d) => matching(runs, kind, { ...wanted, depth: d });
  const final = (kind, d, field) =>
    at(kind, d)
      .map(run => number(run[field]?.at(-1)))
      .filter(given);
  const shown = depths.flatMap(d => KINDS.flatMap(kind => at(kind, d)));
  const everything = field => shown.flatMap(run => run[field].map(number));
  const epochs = Math.max(1, ...shown.map(run => run.train_loss.length));
  const byDepth = (title, field, axis, unit) => ({
    title,
    unit,
    style: "dots",
    marked: index,
    hint: "a click picks a depth",
    x: { labels: depths, unit: " layers", title: "layers" },
    y: {
      ...axis,
      domain: domain(
        KINDS.flatMap(k => depths.flatMap(d => final(k, d, field))),
        axis.log,
      ),
    },
    series: KINDS.map(kind => ({ kind, values: depths.map(d => final(kind, d, field)) })),
  });
  const byEpoch = (title, field, axis, unit) => ({
    title: `${title}, ${depth} layers`,
    unit,
    style: "line",
    hint:
      at(KINDS[0], depth).length + at(KINDS[1], depth).length > 2 ? "thin: each seed; thick: their mean" : "one seed",
    x: { labels: range(epochs).map(e => `epoch ${e + 1}`), short: range(epochs).map(e => e + 1), title: "epoch" },
    y: { ...axis, domain: domain(everything(field), axis.log) },
    series: KINDS.map(kind => ({
      kind,
      values: range(epochs).map(e =>
        at(kind, depth)
          .map(run => number(run[field][e]))
          .filter(given),
      ),
    })),
    missing: !KINDS.some(kind => at(kind, depth).length),
  });
  plots.loss.show(byDepth("Final training loss", LOSS, AXES.loss, "log scale"));
  plots.lossCurve.show(byEpoch("Training loss by epoch", "train_loss", AXES.loss, "log scale"));
  plots.accuracy.show(byDepth("Final test accuracy", "test_accuracy", AXES.accuracy, ""));
  plots.accuracyCurve.show(byEpoch("Test accuracy by epoch", "test_accuracy", AXES.accuracy, ""));

  const spread = (values, format) =>
    values.length > 1
      ? `${format(Math.min(...values))} to ${format(Math.max(...values))}`
      : values.length
        ? "one seed"
        : "";
  const one = values =>
    distinct(values).length > 1
      ? `${count(Math.min(...values))} to ${count(Math.max(...values))}`
      : data(values[0], count);
  $("cards").replaceChildren(
    ...KINDS.map(kind => {
      const loss = final(kind, depth, LOSS),
        accuracy = final(kind, depth, "test_accuracy"),
        here = at(kind, depth);
      const seconds = mean(here.map(run => number(run.seconds)).filter(given));
      const fact = (term, value, more, name) =>
        html("div", { class: name }, html("dt", {}, term), html("dd", {}, value, html("small", {}, more)));
      return html(
        "article",
        { class: `card ${kind}`, "data-kind": kind },
        html("h3", { class: `key ${kind}` }, `${kind}, ${depth} layers`),
        html(
          "dl",
          {},
          fact("final training loss", data(mean(loss)), spread(loss, short), "loss"),
          fact("final test accuracy", data(mean(accuracy), percent), spread(accuracy, percent), "accuracy"),
          fact("parameters", one(here.map(run => run.parameters).filter(given)), "", "parameters"),
          fact("time a run", given(seconds) ? data(seconds, v => `${short(v)} s`) : NONE, "", "seconds"),
        ),
      );
    }),
  );
  $("verdict").textContent = verdict(depth, depths, (kind, d) => mean(final(kind, d, LOSS)));

  $("depth").max = Math.max(0, depths.length - 1);
  $("depth").value = index;
  $("depth").disabled = depths.length < 2;
  $("depth-stops").replaceChildren(...depths.map(d => html("span", {}, String(d))));
  $("depth").setAttribute("aria-valuetext", `${depth} layers`);
  $("depth-out").textContent = depth;
  controls.training.forEach(control => control.set(state.training[control.field]));
  const how = fitted
    ? "of all training images after the last epoch, in evaluation mode"
    : "the last value of the curve by epoch";
  $("depth-note").textContent =
    `Final training loss: ${how}. By epoch: the mean over the epoch’s batches, in training mode. Small points and thin lines are single seeds, large points and thick lines their means, bars and bands from the least to the greatest. Dotted lines only guide the eye: between recorded depths nothing was measured.${strange([...everything("train_loss"), ...everything(LOSS)], true)}`;
  const rows = depths.flatMap(d =>
    KINDS.filter(k => at(k, d).length).map(k => [
      `${d}, ${k}`,
      one(
        at(k, d)
          .map(run => run.parameters)
          .filter(given),
      ),
      String(at(k, d).length),
      data(mean(final(k, d, LOSS))),
      spread(final(k, d, LOSS), short),
      data(mean(final(k, d, "test_accuracy")), percent),
      spread(final(k, d, "test_accuracy"), percent),
    ]),
  );
  $("depth-table").replaceChildren(
    table(
      "Final numbers: mean over seeds, and from the least to the greatest",
      ["layers", "parameters", "seeds", "training loss", "spread", "test accuracy", "spread"],
      rows,
    ),
  );
  const seeds = order(shown.map(run => run.seed));
  const size = degradation.image?.join(" × ");
  provenance($("depth-record"), degradation, [
    [
      "Data set",
      [
        degradation.dataset ?? NONE,
        `: ${count(degradation.train_images)} training and ${count(degradation.test_images)} test images of ${size ?? `a size ${NONE}`}`,
      ],
    ],
    [
      "Training",
      ["epochs", "batch_size", "lr", "momentum", "weight_decay"]
        .map(name => `${name.replace("_", " ")} ${degradation[name] ?? NONE}`)
        .join(" · "),
    ],
    ["Seeds", seeds.length ? seeds.join(", ") : NONE],
  ]);
  if (announce) $("status").textContent = $("verdict").textContent;
}

/** The two sentences that the numbers say, whichever way they fall. */
function verdict(depth, depths, loss) {
  const shallow = depths.find(d => KINDS.every(kind => given(loss(kind, d))));
  const [plain, residual] = KINDS.map(kind => loss(kind, depth));
  if (!given(plain) || !given(residual)) return `With ${depth} layers a comparison is ${NONE}.`;
  const factor = kind => short(loss(kind, depth) / loss(kind, shallow));
  const beside = `With ${depth} layers the plain network’s final training loss is ${short(plain / residual)} times the residual network’s.`;
  if (shallow === depth) return beside;
  return `${beside} From ${shallow} layers on it changed by a factor of ${factor("plain")}, the residual network’s by ${factor("residual")}.`;
}

// --- the demonstration in NumPy ------------------------------------------------------------------------------------

function showNumpy() {
  const numpy = gradients.numpy ?? {},
    columns = [
      ["the lesson", numpy.lesson],
      ["NumPy", numpy],
      ["autograd", numpy.autograd],
    ];
  const digits = { plain: 6, residual: 6, ratio: 1 }; // as the lesson prints them
  const rows = Object.keys(digits).map(name => [
    html("span", name === "ratio" ? {} : { class: `key ${name}` }, name),
    ...columns.map(([, from]) =>
      data(number(from?.[name]), v => (Number.isFinite(v) ? v.toFixed(digits[name]) : short(v))),
    ),
  ]);
  $("numpy-table").replaceChildren(table("Length of ∂L/∂x", ["", ...columns.map(([title]) => title)], rows));
  $("numpy-note").textContent = [agreement(numpy, columns), printed(numpy, digits)].join(" ");
  provenance($("numpy-record"), gradients, []);
}

function agreement(numpy, columns) {
  const off = number(numpy.relative_difference);
  if (given(off)) return `NumPy and autograd differ by ${short(off, 2)} of the gradient.`;
  return columns.every(([, from]) => given(from)) ? "" : "Not all of these numbers are recorded.";
}

/** Whether the lines of the lesson print what it says that they print. */
function printed(numpy, digits) {
  const { lesson } = numpy;
  if (!lesson || !given(numpy.residual)) return "";
  const same = Object.entries(digits).every(
    ([name, d]) => Math.abs(number(numpy[name]) - number(lesson[name])) <= 0.5000001 * 10 ** -d,
  );
  if (same) return "The lesson prints the same digits.";
  const length =
    Math.abs(number(numpy.residual) / Math.SQRT2 / 2 - 1) < 0.01 && Math.abs(number(lesson.residual) - 1) < 0.01
      ? " A gradient of eight ones that passes unchanged has the length √8 ≈ 2.83, so the 1.00 cannot come from these lines."
      : "";
  return `The lesson prints other digits than its lines do when they run.${length} Its point is the ratio, and that the 1 carries it.`;
}

// --- begin ---------------------------------------------------------------------------------------------------------

read();
addControls(
  "gradient",
  $("gradient-controls"),
  ["activation", "depth", "step", "block", "shortcut", "of"],
  showGradient,
);
addControls("training", $("depth-controls"), ["activation", "block", "shortcut"], showDepth);
$("depth-controls").hidden = !controls.training.some(control => FIELDS.training[control.field].length > 1);
$("shortcut").addEventListener("change", event => ((state.on = event.target.checked), write(), showGradient()));
$("depth").addEventListener("input", event => choose(Number(event.target.value)));
addEventListener("hashchange", () => {
  read();
  showGradient(false);
  showDepth(false);
});
provenance($("gradient-record"), gradients, [
  ["Data set", `${gradients.dataset ?? NONE}: images of ${gradients.image?.join(" × ") ?? `a size ${NONE}`}`],
]);
showGradient(false);
showDepth(false);
showNumpy();
