// The records, what of them is chosen, and where they come from.

const { degradation, gradients } = JSON.parse(document.getElementById("records").textContent);

// --- state: the controls and the address ---------------------------------------------------------------------------

const NAMES = {
  block: { title: "Block", basic: "basic", bottleneck: "bottleneck" },
  activation: { title: "Activation", post: "post", pre: "pre" },
  shortcut: {
    title: "Where shapes change",
    projection: "1×1 convolution",
    zero_pad: "zero padding",
    projection_all: "1×1 everywhere",
  },
  depth: { title: "Layers" },
  step: { title: "When", 0: "at initialisation" },
  of: { title: "Gradient of", weights: "weights", blocks: "block inputs" },
};
const nameOf = (field, value) => NAMES[field]?.[value] ?? (field === "step" ? `after ${value} steps` : String(value));

/** A group of radio buttons: keyboard and names come with them. */
function choice(group, field, values, onchange) {
  const buttons = values.map(value =>
    html(
      "label",
      {},
      html("input", { type: "radio", name: `${group}-${field}`, value }),
      html("span", {}, nameOf(field, value)),
    ),
  );
  const set = html("fieldset", { class: "choice" }, html("legend", {}, NAMES[field].title), html("div", {}, buttons));
  set.addEventListener("change", event => onchange(values.find(v => String(v) === event.target.value)));
  return {
    element: set,
    set: value => buttons.forEach((button, i) => (button.firstChild.checked = values[i] === value)),
  };
}

/** The entries of one kind with these fields; a plain network has no shortcut to match. */
const matching = (entries, kind, wanted) =>
  entries.filter(
    entry =>
      entry.kind === kind &&
      Object.entries(wanted).every(
        ([field, value]) => entry[field] === value || (field === "shortcut" && kind === "plain") || !given(value),
      ),
  );

const order = values => distinct(values.filter(given)).sort((a, b) => (typeof a === "number" ? a - b : 0));

const residualOf = entries => entries.filter(e => e.kind === "residual");
const options = (entries, field) => order((field === "shortcut" ? residualOf(entries) : entries).map(e => e[field]));
const { stacks } = gradients,
  { runs } = degradation;
const ENTRIES = { gradient: stacks, training: runs };

const FIELDS = {
  gradient: {
    block: options(stacks, "block"),
    activation: options(stacks, "activation"),
    shortcut: options(stacks, "shortcut"),
    depth: options(stacks, "depth"),
    step: options(stacks, "step"),
    of: stacks.some(s => s.block_grad_norm?.length) ? ["weights", "blocks"] : ["weights"],
  },
  training: {
    block: options(runs, "block"),
    activation: options(runs, "activation"),
    shortcut: options(runs, "shortcut"),
    depth: options(runs, "depth"),
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
  const alike = entry =>
    Object.keys(chosen).filter(name => entry[name] === chosen[name]).length -
    Math.abs(entry.depth - chosen.depth) / 1e6;
  const others = ENTRIES[group].filter(entry => !field || entry[field] === chosen[field]);
  const nearest = others.reduce((a, b) => (alike(b) > alike(a) ? b : a));
  for (const name of Object.keys(chosen)) state[group][name] = nearest[name] ?? chosen[name];
}

for (const group of ["gradient", "training"]) {
  const plain = recorded(group, ["plain"]);
  state[group].depth =
    recorded(group, ["residual"]).findLast(d => plain.includes(d)) ?? recorded(group).at(-1) ?? state[group].depth;
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
    ? Object.entries(record.machine)
        .filter(([, v]) => given(v) && typeof v !== "object")
        .map(([k, v]) => `${k} ${v}`)
        .join(" · ")
    : NONE;
  const command = html("code", {}, record.command ?? NONE);
  const rows = [
    ["Recorded by", given(record.command) ? [command, copier(record.command)] : command],
    ...entries,
    ["Machine", machine || NONE],
    ...(given(record.note) ? [["Note", record.note]] : []),
  ];
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
