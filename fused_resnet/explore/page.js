// The page: what is chosen, and the records that it shows.

const { degradation, gradients } = JSON.parse(document.getElementById("records").textContent);

// --- state: the controls and the address ---------------------------------------------------------------------------

const NAMES = {
  block: { title: "Block", basic: "basic", bottleneck: "bottleneck" },
  activation: { title: "Activation", post: "post", pre: "pre" },
  shortcut: { title: "Where shapes change", projection: "1×1 convolution", zero_pad: "zero padding", projection_all: "1×1 everywhere" },
  depth: { title: "Layers" },
  step: { title: "When", 0: "at initialisation" },
  of: { title: "Gradient of", weights: "weights", blocks: "block inputs" },
};
const nameOf = (field, value) => NAMES[field]?.[value] ?? (field === "step" ? `after ${value} steps` : String(value));

/** A group of radio buttons: keyboard and names come with them. */
function choice(group, field, values, onchange) {
  const buttons = values.map(value => html("label", {},
    html("input", { type: "radio", name: `${group}-${field}`, value }), html("span", {}, nameOf(field, value))));
  const set = html("fieldset", { class: "choice" }, html("legend", {}, NAMES[field].title), html("div", {}, buttons));
  set.addEventListener("change", event => onchange(values.find(v => String(v) === event.target.value)));
  return {
    element: set,
    set: value => buttons.forEach((button, i) => (button.firstChild.checked = values[i] === value)),
  };
}

/** The entries of one kind with these fields; a plain network has no shortcut to match. */
const matching = (entries, kind, wanted) => entries.filter(entry => entry.kind === kind &&
  Object.entries(wanted).every(([field, value]) => entry[field] === value || (field === "shortcut" && kind === "plain") || !given(value)));

const order = values => distinct(values.filter(given)).sort((a, b) => (typeof a === "number" ? a - b : 0));

const residualOf = entries => entries.filter(e => e.kind === "residual");
const options = (entries, field) => order((field === "shortcut" ? residualOf(entries) : entries).map(e => e[field]));
const { stacks } = gradients, { runs } = degradation;
const ENTRIES = { gradient: stacks, training: runs };

const FIELDS = {
  gradient: {
    block: options(stacks, "block"), activation: options(stacks, "activation"), shortcut: options(stacks, "shortcut"),
    depth: options(stacks, "depth"), step: options(stacks, "step"),
    of: stacks.some(s => s.block_grad_norm?.length) ? ["weights", "blocks"] : ["weights"],
  },
  training: {
    block: options(runs, "block"), activation: options(runs, "activation"), shortcut: options(runs, "shortcut"), depth: options(runs, "depth"),
  },
};
const ALWAYS = ["activation", "depth", "step"]; // shown even where there is nothing to choose

const state = {
  on: true,
  gradient: Object.fromEntries(Object.entries(FIELDS.gradient).map(([field, values]) => [field, values[0]])),
  training: Object.fromEntries(Object.entries(FIELDS.training).map(([field, values]) => [field, values[0]])),
};

/** The depths recorded for what else is chosen, of one kind or both. */
function recorded(group, kinds = KINDS) {
  const { depth, of, ...wanted } = state[group];
  return order(kinds.flatMap(kind => matching(ENTRIES[group], kind, wanted)).map(entry => entry.depth));
}

/** A choice that was not recorded for either kind: what was recorded for this one and is otherwise most alike. */
function settle(group, field) {
  const { of, ...chosen } = state[group];
  if (KINDS.some(kind => matching(ENTRIES[group], kind, chosen).length)) return;
  const alike = entry => Object.keys(chosen).filter(name => entry[name] === chosen[name]).length - Math.abs(entry.depth - chosen.depth) / 1e6;
  const others = ENTRIES[group].filter(entry => !field || entry[field] === chosen[field]);
  const nearest = others.reduce((a, b) => (alike(b) > alike(a) ? b : a));
  for (const name of Object.keys(chosen)) state[group][name] = nearest[name] ?? chosen[name];
}

for (const group of ["gradient", "training"]) {
  const plain = recorded(group, ["plain"]);
  state[group].depth = recorded(group, ["residual"]).findLast(d => plain.includes(d)) ?? recorded(group).at(-1) ?? state[group].depth;
}

function read() {
  const hash = new URLSearchParams(location.hash.slice(1));
  if (hash.has("shortcut")) state.on = hash.get("shortcut") !== "off";
  for (const group of ["gradient", "training"]) {
    for (const [field, values] of Object.entries(FIELDS[group])) {
      const value = values.find(v => String(v) === hash.get(`${group}.${field}`));
      if (given(value)) state[group][field] = value;
    }
    settle(group);
  }
}

function write() {
  const hash = new URLSearchParams({ shortcut: state.on ? "on" : "off" });
  for (const group of ["gradient", "training"]) {
    for (const [field, values] of Object.entries(FIELDS[group])) {
      if (values.length > 1) hash.set(`${group}.${field}`, state[group][field]);
    }
  }
  history.replaceState(null, "", `#${hash}`);
}

const controls = { gradient: [], training: [] };
function addControls(group, form, fields, refresh) {
  form.addEventListener("submit", event => event.preventDefault());
  for (const field of fields) {
    const values = FIELDS[group][field];
    if (!values.length || (values.length < 2 && !ALWAYS.includes(field))) continue;
    const control = choice(group, field, values, value => {
      state[group][field] = value;
      settle(group, field);
      write();
      refresh();
    });
    controls[group].push({ field, ...control });
    form.append(control.element);
  }
}

// --- what was recorded, beside every figure ------------------------------------------------------------------------

function provenance(list, record, entries) {
  const machine = given(record.machine)
    ? Object.entries(record.machine).filter(([, v]) => given(v) && typeof v !== "object").map(([k, v]) => `${k} ${v}`).join(" · ")
    : NONE;
  const command = html("code", {}, record.command ?? NONE);
  const rows = [["Recorded by", given(record.command) ? [command, copier(record.command)] : command], ...entries, ["Machine", machine || NONE]];
  list.replaceChildren(...rows.map(([term, what]) => html("div", {}, html("dt", {}, term), html("dd", {}, what))));
}

function copier(text) {
  const button = html("button", { type: "button", class: "copy", "aria-label": "Copy the command" }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(button.previousSibling);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

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
  const { of, ...wanted } = state.gradient, kind = state.on ? "residual" : "plain", other = state.on ? "plain" : "residual";
  const stack = Object.fromEntries(KINDS.map(k => [k, matching(stacks, k, wanted)[0]]));
  const found = Object.fromEntries(KINDS.map(k => [k, norms(stack[k], of)]));
  const names = merge(found.residual.names, found.plain.names);
  const along = ({ names: own, values }) => {
    const at = new Map(own.map((name, i) => [name, values[i]]));
    return names.map(name => (at.has(name) ? [at.get(name)] : []));
  };
  const all = stacks.filter(s => s.block === wanted.block).flatMap(s => norms(s, of).values);
  gradientPlot.show({
    title: of === "blocks" ? "Gradient at the input of each block" : "Gradient of each layer’s weights",
    unit: "2-norm, log scale",
    x: { labels: names, short: names.map((_, i) => i + 1), groups: names.map(name => name.match(/^layer\d+/)?.[0]), title: of === "blocks" ? "block, from the input" : "layer, from the input" },
    y: { domain: domain(all, true), log: true, format: logLabel, value: short },
    series: [other, kind].map(k => ({ kind: k, faint: k === other, values: along(found[k]) })),
    style: "line",
    missing: !found[kind].values.length,
    hint: "hover, or focus and use the arrow keys",
  }, animate);

  const values = found[kind].values, first = values[0], last = values.at(-1);
  const facts = [["first " + (of === "blocks" ? "block" : "layer"), data(first)], ["last " + (of === "blocks" ? "block" : "layer"), data(last)],
    ["first ÷ last", data(values.length ? first / last : undefined)], ["loss", data(number(stack[kind]?.loss))]];
  $("gradient-facts").className = `facts ${kind}`;
  $("gradient-facts").replaceChildren(...facts.map(([term, what]) => html("div", {}, html("dt", {}, term), html("dd", {}, what))));

  const said = [`${wanted.depth} layers`, wanted.block && `${wanted.block} blocks`, wanted.activation && `${wanted.activation}-activation`, nameOf("step", wanted.step), `a batch of ${stack[kind]?.batch ?? stack[other]?.batch ?? gradients.batch ?? NONE}`].filter(Boolean).join(", ");
  const absent = KINDS.filter(k => !found[k].values.length).map(k => ` The ${k} network is ${NONE} for this choice.`).join("");
  $("gradient-note").textContent = `${said}. The scale stays when you switch; the other network stays in the background.${absent}${strange(Object.values(found).flatMap(f => f.values), true)}`;
  const row = i => [names[i], ...KINDS.map(k => data(along(found[k])[i][0], v => short(v, 4)))];
  $("gradient-table").replaceChildren(table(`Gradient norms: ${said}`, ["layer", "plain", "residual"], names.map((_, i) => row(i))));
  showBlock(wanted, animate);
  $("shortcut").checked = state.on;
  controls.gradient.forEach(control => control.set(state.gradient[control.field]));
  if (animate) $("status").textContent = `Shortcut ${state.on ? "on" : "off"}. First layer ${short(first)}, last layer ${short(last)}.`;
}

/** The block as it is wired: layers from x down to y, the shortcut around them. */
function showBlock({ block, activation, shortcut }, animate) {
  const convolutions = block === "bottleneck" ? ["1×1 conv", "3×3 conv", "1×1 conv"] : ["3×3 conv", "3×3 conv"];
  const branch = activation === "pre"
    ? convolutions.flatMap(conv => ["batch norm", "ReLU", conv])
    : convolutions.flatMap((conv, i) => [conv, "batch norm", ...(i + 1 < convolutions.length ? ["ReLU"] : [])]);
  const tail = activation === "pre" ? [] : ["ReLU"];
  const rows = branch.length + 1 + tail.length, pitch = 308 / rows, center = i => 48 + pitch * (i + 0.5), X = 72, WIRE = 172;
  const size = Math.min(30, pitch - 9), plus = center(branch.length);
  const box = (name, i) => svg("g", { class: `box ${name === "ReLU" ? "relu" : name.endsWith("conv") ? "conv" : "norm"}` },
    svg("rect", { x: X - 52, y: center(i) - size / 2, width: 104, height: size, rx: 6 }),
    svg("text", { x: X, y: center(i) + 4.5, "text-anchor": "middle" }, name));
  const trunk = `M${X} 366V26`; // as the gradient goes: from y back to x
  const around = `M${X} ${plus}H${WIRE - 14}Q${WIRE} ${plus} ${WIRE} ${plus - 14}V50Q${WIRE} 36 ${WIRE - 14} 36H${X}`;
  const head = (x, y, turn) => svg("path", { class: "head", d: "M0 0l-4.5 -9h9z", transform: `translate(${x} ${y}) rotate(${turn})` });
  const ends = svg("g", { class: "ends" }, svg("text", { x: X, y: 19, "text-anchor": "middle" }, "x"), svg("text", { x: X, y: 384, "text-anchor": "middle" }, "y"));
  const wires = [svg("path", { class: "wire", d: trunk }), svg("path", { class: "flow", d: trunk }), head(X, 369, 0)];
  const skip = svg("g", { class: "skip" }, svg("path", { class: "wire", d: around }), svg("path", { class: "flow", d: around }),
    svg("text", { transform: `translate(${WIRE + 17} ${(plus + 36) / 2}) rotate(-90)`, "text-anchor": "middle" }, "+ x"),
    svg("circle", { cx: X, cy: plus, r: 12 }), head(X + 13, plus, 90), svg("path", { class: "plus", d: `M${X - 6} ${plus}h12M${X} ${plus - 6}v12` }));
  const diagram = $("diagram");
  diagram.replaceChildren(...wires, skip, ...branch.map(box), ...tail.map((name, i) => box(name, branch.length + 1 + i)), ends);
  diagram.setAttribute("class", `${state.on ? "residual" : "plain"}${animate ? " flowing" : ""}`);
  const wiring = state.on ? `; the shortcut carries x around all of it, and is added ${tail.length ? "before the last ReLU" : "at the end, with no ReLU after it"}` : "; no shortcut";
  diagram.setAttribute("aria-label", `${state.on ? "Residual" : "Plain"} block, ${activation ?? "post"}-activation: ${[...branch, ...tail].join(", ")}${wiring}`);
  $("formula").replaceChildren("∂", html("i", {}, "L"), "/∂", html("i", {}, "x"), " = ∂", html("i", {}, "L"), "/∂", html("i", {}, "y"), " · ",
    html("span", { class: "factor" }, ...(state.on ? ["(", html("b", {}, "1 + "), "∂", html("i", {}, "F"), "/∂", html("i", {}, "x"), ")"] : ["∂", html("i", {}, "F"), "/∂", html("i", {}, "x")])));
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
  const { depth, ...wanted } = state.training, depths = recorded("training"), index = Math.max(0, depths.indexOf(depth));
  const at = (kind, d) => matching(runs, kind, { ...wanted, depth: d });
  const final = (kind, d, field) => at(kind, d).map(run => number(run[field]?.at(-1))).filter(given);
  const shown = depths.flatMap(d => KINDS.flatMap(kind => at(kind, d)));
  const everything = field => shown.flatMap(run => run[field].map(number));
  const epochs = Math.max(1, ...shown.map(run => run.train_loss.length));
  const byDepth = (title, field, axis, unit) => ({
    title, unit, style: "dots", marked: index, hint: "a click picks a depth",
    x: { labels: depths, unit: " layers", title: "layers" },
    y: { ...axis, domain: domain(KINDS.flatMap(k => depths.flatMap(d => final(k, d, field))), axis.log) },
    series: KINDS.map(kind => ({ kind, values: depths.map(d => final(kind, d, field)) })),
  });
  const byEpoch = (title, field, axis, unit) => ({
    title: `${title}, ${depth} layers`, unit, style: "line", hint: "thin: each seed; thick: their mean",
    x: { labels: range(epochs).map(e => `epoch ${e + 1}`), short: range(epochs).map(e => e + 1), title: "epoch" },
    y: { ...axis, domain: domain(everything(field), axis.log) },
    series: KINDS.map(kind => ({ kind, values: range(epochs).map(e => at(kind, depth).map(run => number(run[field][e])).filter(given)) })),
    missing: !KINDS.some(kind => at(kind, depth).length),
  });
  plots.loss.show(byDepth("Final training loss", LOSS, AXES.loss, "log scale"));
  plots.lossCurve.show(byEpoch("Training loss by epoch", "train_loss", AXES.loss, "log scale"));
  plots.accuracy.show(byDepth("Final test accuracy", "test_accuracy", AXES.accuracy, ""));
  plots.accuracyCurve.show(byEpoch("Test accuracy by epoch", "test_accuracy", AXES.accuracy, ""));

  const spread = (values, format) => (values.length > 1 ? `${format(Math.min(...values))} to ${format(Math.max(...values))}` : values.length ? "one seed" : "");
  const one = values => (distinct(values).length > 1 ? `${count(Math.min(...values))} to ${count(Math.max(...values))}` : data(values[0], count));
  $("cards").replaceChildren(...KINDS.map(kind => {
    const loss = final(kind, depth, LOSS), accuracy = final(kind, depth, "test_accuracy"), here = at(kind, depth);
    const seconds = mean(here.map(run => number(run.seconds)).filter(given));
    const fact = (term, value, more, name) => html("div", { class: name }, html("dt", {}, term), html("dd", {}, value, html("small", {}, more)));
    return html("article", { class: `card ${kind}`, "data-kind": kind }, html("h3", { class: `key ${kind}` }, `${kind}, ${depth} layers`),
      html("dl", {}, fact("final training loss", data(mean(loss)), spread(loss, short), "loss"), fact("final test accuracy", data(mean(accuracy), percent), spread(accuracy, percent), "accuracy"),
        fact("parameters", one(here.map(run => run.parameters).filter(given)), "", "parameters"), fact("time a run", given(seconds) ? data(seconds, v => `${short(v)} s`) : NONE, "", "seconds")));
  }));
  $("verdict").textContent = verdict(depth, depths, (kind, d) => mean(final(kind, d, LOSS)));

  $("depth").max = Math.max(0, depths.length - 1);
  $("depth").value = index;
  $("depth").disabled = depths.length < 2;
  $("depth-stops").replaceChildren(...depths.map(d => html("span", {}, String(d))));
  $("depth").setAttribute("aria-valuetext", `${depth} layers`);
  $("depth-out").textContent = depth;
  controls.training.forEach(control => control.set(state.training[control.field]));
  const how = fitted ? "of all training images after the last epoch, in evaluation mode" : "the last value of the curve by epoch";
  $("depth-note").textContent = `Final training loss: ${how}. By epoch: the mean over the epoch’s batches, in training mode. Small points and thin lines are single seeds, large points and thick lines their means, bars and bands from the least to the greatest. Dotted lines only guide the eye: between recorded depths nothing was measured.${strange([...everything("train_loss"), ...everything(LOSS)], true)}`;
  const rows = depths.flatMap(d => KINDS.filter(k => at(k, d).length).map(k => [`${d}, ${k}`, one(at(k, d).map(run => run.parameters).filter(given)), String(at(k, d).length),
    data(mean(final(k, d, LOSS))), spread(final(k, d, LOSS), short), data(mean(final(k, d, "test_accuracy")), percent), spread(final(k, d, "test_accuracy"), percent)]));
  $("depth-table").replaceChildren(table("Final numbers: mean over seeds, and from the least to the greatest", ["layers", "parameters", "seeds", "training loss", "spread", "test accuracy", "spread"], rows));
  const seeds = order(shown.map(run => run.seed));
  const size = degradation.image?.join(" × ");
  provenance($("depth-record"), degradation, [
    ["Data set", [degradation.dataset ?? NONE, `: ${count(degradation.train_images)} training and ${count(degradation.test_images)} test images of ${size ?? `a size ${NONE}`}`]],
    ["Training", ["epochs", "batch_size", "lr", "momentum", "weight_decay"].map(name => `${name.replace("_", " ")} ${degradation[name] ?? NONE}`).join(" · ")],
    ["Seeds", seeds.length ? seeds.join(", ") : NONE],
  ]);
  if (announce) $("status").textContent = $("verdict").textContent;
}

/** The two sentences that the numbers say, whichever way they fall. */
function verdict(depth, depths, loss) {
  const compare = (a, b) => (a / b >= 1.005 ? `${short(a / b)} times` : a / b <= 0.995 ? `${short(b / a)} times less than` : "the same as");
  const usable = (...values) => values.every(v => Number.isFinite(v) && v > 0);
  const [plain, residual] = KINDS.map(kind => loss(kind, depth)), shallow = depths.find(d => given(loss("plain", d)));
  const sentences = [];
  if (usable(plain, residual)) sentences.push(`With ${depth} layers the plain network ends with ${compare(plain, residual)} the residual network’s training loss.`);
  if (shallow < depth && usable(plain, loss("plain", shallow))) sentences.push(`That is ${compare(plain, loss("plain", shallow))} what a plain network of ${shallow} layers reaches.`);
  return sentences.join(" ") || `With ${depth} layers a comparison is ${NONE}.`;
}

// --- the demonstration in NumPy ------------------------------------------------------------------------------------

function showNumpy() {
  const numpy = gradients.numpy ?? {}, columns = [["the lesson", numpy.lesson], ["NumPy", numpy], ["autograd", numpy.autograd]];
  const digits = { plain: 6, residual: 6, ratio: 1 }; // as the lesson prints them
  const rows = Object.keys(digits).map(name => [
    html("span", name === "ratio" ? {} : { class: `key ${name}` }, name),
    ...columns.map(([, from]) => data(number(from?.[name]), v => (Number.isFinite(v) ? v.toFixed(digits[name]) : short(v)))),
  ]);
  $("numpy-table").replaceChildren(table("Length of ∂L/∂x", ["", ...columns.map(([title]) => title)], rows));
  const agree = columns.slice(1).every(([, from]) => Object.entries(digits).every(([name, d]) => Math.abs(number(from?.[name]) - number(numpy.lesson?.[name])) <= 0.5000001 * 10 ** -d));
  $("numpy-note").textContent = agree ? "To the digits that the lesson prints, all three agree." : "Not all of these numbers are recorded, or not all agree to the digits that the lesson prints.";
  provenance($("numpy-record"), gradients, []);
}

// --- begin ---------------------------------------------------------------------------------------------------------

read();
addControls("gradient", $("gradient-controls"), ["activation", "depth", "step", "block", "shortcut", "of"], showGradient);
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
