"use strict";
const at = id => document.getElementById(id);
const make = (tag, text, kind) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
};
const option = (value, text) => { const made = make("option", text ?? value); made.value = value; return made; };
const lines = text => text.split("\n").map(line => line.trim()).filter(line => line);
const counted = (count, thing) => count + " " + thing + (count === 1 ? "" : "s");

async function answer(path, body, method) {
  const headers = {};
  if (at("token").value) headers.Authorization = "Bearer " + at("token").value;
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: method ?? (body ? "POST" : "GET"), headers, body: body && JSON.stringify(body) });
  if (response.ok) return response;
  if (response.status === 401) at("access").hidden = false;
  const found = await response.json().catch(() => ({}));
  throw new Error(found.error ? found.error.message : "HTTP " + response.status);
}
const ask = async (...given) => (await answer(...given)).json();

async function attempt(work) {
  at("problem").textContent = "";
  try { await work(); } catch (error) { at("problem").textContent = error.message; }
}

const on = (id, event, work) => at(id).addEventListener(event, given => {
  if (event === "submit") given.preventDefault();
  attempt(() => work(given));
});

// A button that waits is not clicked twice.
const once = (id, work) => on(id, "click", async () => {
  at(id).disabled = true;
  try { await work(); } finally { at(id).disabled = false; }
});

function bars(place, prediction) {
  const sorted = Object.entries(prediction.probabilities).sort((a, b) => b[1] - a[1]).slice(0, 20);
  const given = prediction.labels ?? [sorted[0][0]];
  place.replaceChildren(...sorted.map(([label, p]) => {
    const row = make("div", undefined, given.includes(label) ? "row best" : "row"), bar = make("div", undefined, "bar"), inner = make("div");
    inner.style.width = (100 * p) + "%";
    bar.append(inner);
    const name = make("span", label);
    name.title = label;
    row.append(name, bar, make("span", (100 * p).toFixed(1) + " %"));
    return row;
  }));
}

// Try an adapter.

let task = null;
let turn = 0;  // counts choices; a response for an earlier choice is ignored

const address = name => "v1/adapters/" + name.split("/").map(encodeURIComponent).join("/");

async function list() {
  const found = await ask("v1/adapters");
  at("adapters").replaceChildren(...found.adapters.map(each => option(each.name)));
  at("about").textContent = counted(found.adapters.length, "adapter") + " of " + found.base + ". Pick one, write a text, and compare the "
    + "probabilities with and without the adapter.";
  if (!at("adapter").value && found.adapters.length) at("adapter").value = found.adapters[0].name;
  return found.adapters.length;
}

async function choose() {
  const mine = ++turn;
  task = null;
  at("go").disabled = true;
  at("sides").hidden = true;
  at("fields").replaceChildren();
  const found = await ask(address(at("adapter").value));
  if (mine !== turn) return;
  if (!found.columns) throw new Error("This adapter has no labels.");
  for (const column of found.columns) {
    const label = make("label", column), field = make("textarea");
    label.htmlFor = field.id = "column-" + column;
    field.rows = 3;
    field.dataset.column = column;
    at("fields").append(label, field);
  }
  task = found;
  at("go").disabled = false;
  at("example").hidden = !found.example;
}

async function classify() {
  const mine = turn;
  const row = {};
  for (const field of document.querySelectorAll("#fields textarea")) row[field.dataset.column] = field.value;
  const body = { adapter: task.name, rows: [row] };
  const [adapted, plain] = await Promise.all([
    ask("v1/classify", body), ask("v1/classify", { ...body, without_adapter: true })]);
  if (mine !== turn) return;
  bars(at("with"), adapted.predictions[0]);
  bars(at("without"), plain.predictions[0]);
  at("sides").hidden = false;
}

on("form", "submit", classify);
on("adapter", "change", choose);
on("example", "click", () => {
  for (const field of document.querySelectorAll("#fields textarea")) field.value = task.example[field.dataset.column] ?? "";
});

// A new project: a table, its columns, the labels.

let table = null;  // what the server says of it
let looks = 0;

async function look() {
  const mine = ++looks;
  at("details").hidden = true;
  if (!at("table").value.trim()) return;
  const found = await ask("v1/tables", { table: at("table").value });
  if (mine !== looks) return;
  table = found;
  const names = found.columns.map(each => each.name);
  at("size").textContent = counted(found.rows, "row") + " with " + counted(names.length, "column") + ".";
  at("column").replaceChildren(...names.map(name => option(name)));
  // The column of the longest texts.
  const length = each => each.labels ? 0 : Math.max(0, ...each.examples.map(text => text.length));
  at("column").value = found.columns.reduce((best, each) => length(each) > length(best) ? each : best).name;
  at("label-column").replaceChildren(option("", "none"), ...found.columns.filter(each => each.labels).map(each => option(each.name)));
  if (names.includes("label") && names.length > 1) at("label-column").value = "label";
  at("details").hidden = false;
  fill();
  preview();
}

function preview() {
  const { examples } = table.columns.find(each => each.name === at("column").value);
  at("preview").replaceChildren(...examples.map(text => make("li", text.length > 160 ? text.slice(0, 160) + " …" : text)));
}

function fill() {
  const found = table.columns.find(each => each.name === at("label-column").value);
  if (found) at("labels").value = found.labels.join("\n");
}

async function take(file) {
  if (!file) return;
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error(file.name + " is not text in UTF-8; save it as CSV (UTF-8), and take that file.");
  }
  at("table").value = text;
  at("name").value ||= file.name.replace(/\.\w+$/, "").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "");
  await look();
}

async function start() {
  if (!at("name").value.trim()) {
    at("name").focus();
    throw new Error("Give the project a name, such as tickets.");
  }
  const made = await ask("v1/projects", {
    table: at("table").value, name: at("name").value.trim(), column: at("column").value, labels: lines(at("labels").value),
    label_column: at("label-column").value || null });
  for (const id of ["table", "file", "labels", "name"]) at(id).value = "";
  at("details").hidden = true;
  location.hash = "project/" + made.name;
}

let typing;
at("table").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(() => attempt(look), 300); });
on("file", "change", () => take(at("file").files[0]));
on("column", "change", preview);
on("label-column", "change", fill);
on("new", "submit", start);
for (const event of ["dragover", "dragleave", "drop"]) {
  at("drop").addEventListener(event, given => {
    if (!given.dataTransfer.types.includes("Files")) return;  // a text goes into the field
    given.preventDefault();
    at("drop").classList.toggle("over", event === "dragover");
    if (event === "drop") attempt(() => take(given.dataTransfer.files[0]));
  });
}

async function projects() {
  const found = await ask("v1/projects");
  at("new").hidden = found.refused !== null;
  at("refused").hidden = found.refused === null;
  at("refused").textContent = found.refused;
  at("known").hidden = !found.projects.length;
  at("projects").replaceChildren(...found.projects.map(name => {
    const item = make("li"), link = make("a", name);
    link.href = "#project/" + name;
    item.append(link);
    return item;
  }));
}

// Label rows, train, and try the result.

const KEYS = "1234567890qwertyiopdfghjklzxcvbnm";  // without s and u
const ENOUGH = 20;
const POLL = 500, RETRY = 3000;
let project = null, rows = [], busy = false, polling, failed = null;
let visit = 0;  // counts the pages that were shown; an answer to a request from an earlier one is ignored

const of = (path = "") => "v1/projects/" + encodeURIComponent(project.name) + path;
const sum = labels => Object.values(labels).reduce((all, count) => all + count, 0);

async function open(name) {
  const mine = visit;
  const found = await ask("v1/projects/" + encodeURIComponent(name));
  if (mine !== visit) return;
  rows = [];
  failed = null;
  at("text").value = "";
  at("said").replaceChildren();
  at("all-labels").value = Object.keys(found.labels).join("\n");
  update(found);
  at("project").hidden = false;
  at("project-name").focus();
  await next();
}

function choice(label, place) {
  const button = make("button");
  button.dataset.label = label;
  if (KEYS[place]) button.append(make("kbd", KEYS[place].toUpperCase()));
  button.append(make("span", label), make("span", "", "count"));
  button.addEventListener("click", () => attempt(() => give(label)));
  return button;
}

// Requests about the project, one after the other, so that no answer is older than what is shown.
let turns = Promise.resolve();
const inTurn = work => turns = turns.catch(() => {}).then(work);

const later = wait => { clearTimeout(polling); polling = setTimeout(poll, wait); };

function update(found) {
  project = found;
  const names = Object.keys(found.labels), done = sum(found.labels), training = found.job?.kind === "train";
  at("project-name").textContent = found.name;
  at("counted").textContent = counted(done, "row") + " labelled of " + found.rows
    + (found.skipped ? ", " + found.skipped + " skipped." : ".");
  at("labelled").value = done;
  const shown = [...at("choices").children].map(button => button.dataset.label);
  if (JSON.stringify(shown) !== JSON.stringify(names)) at("choices").replaceChildren(...names.map(choice));
  for (const button of at("choices").children) {
    button.disabled = !rows.length;
    button.lastChild.textContent = found.labels[button.dataset.label];
  }
  at("skip").disabled = !rows.length;
  at("undo").disabled = !found.last;
  const rare = names.filter(label => found.labels[label] < 2);
  at("advice").textContent = rare.length ? "Each label needs two rows at least; still missing: " + rare.join(", ") + "."
    : done < ENOUGH ? counted(ENOUGH - done, "more row") + " would make it better; you can train now, and again later."
    : found.trained && found.trained.labelled < done ? "There are labels that the adapter has not learned yet."
    : "You can train now, and label more rows later.";
  at("train-now").hidden = training;
  at("cancel").hidden = !training;
  at("job").hidden = !found.job;
  if (found.job) {
    const { stage, done, total, note } = found.job;
    at("stage").textContent = (found.job.kind === "read" ? "Reading the texts: " : "") + stage
      + (total ? " " + done + " of " + total : "") + (note ? ", " + note : "");
    if (total) { at("steps").max = total; at("steps").value = done; } else at("steps").removeAttribute("value");
    later(POLL);
  }
  if (found.problem && found.problem !== failed) at("problem").textContent = found.problem;
  failed = found.problem;
  at("trained").hidden = at("get-adapter").hidden = !found.trained;
  if (found.trained) result(found.trained);
}

function result({ examples, accuracy, majority }) {
  const always = "Always giving the most frequent label would be right for " + Math.round(majority * examples) + " of them.";
  at("accuracy").textContent = accuracy === null ? "Trained on " + counted(examples, "row")
    : "Right for " + Math.round(accuracy * examples) + " of " + counted(examples, "labelled row");
  at("meaning").textContent = accuracy === null ? "How good it is was not measured."
    : "Accuracy " + (100 * accuracy).toFixed(0) + " % by cross-validation: each row was predicted by a model that had not seen it. " + always;
  at("curl").textContent = "curl " + location.origin + "/v1/classify --json '"
    + JSON.stringify({ adapter: project.name, texts: ["…"] }) + "'";
}

async function poll() {
  const mine = visit, path = of();
  try {
    const found = await inTurn(() => ask(path));
    if (mine !== visit) return;
    update(found);
    if (found.job?.kind === "read" || found.problem) return;
    if (!rows.length) await next();
  } catch (error) {
    if (mine !== visit) return;
    at("problem").textContent = error.message;
    later(RETRY);
  }
}

// Show the next row, and ask for more where there is none.
async function next() {
  if (!rows.length) {
    const mine = visit;
    const found = await ask(of("/suggestions?count=10"));
    if (mine !== visit) return;
    rows = found.rows;
    if (!rows.length) {
      at("row-number").textContent = "";
      at("row-text").textContent = found.job ? "The texts are being read, so that those come first whose labels teach most …"
        : "There are no further rows.";
      update({ ...project, job: found.job ?? project.job });
      return;
    }
  }
  at("row-number").textContent = "Row " + rows[0].row;
  at("row-text").textContent = rows[0].text;
  at("row-text").scrollTop = 0;
  update(project);
}

// While a change is under way, keys and buttons do nothing: they would be about a row that nobody has seen.
// `work` asks the server, and `moved` changes the rows accordingly if they are still shown.
async function change(work, moved) {
  if (busy) return;
  busy = true;
  const mine = visit;
  try {
    const found = await inTurn(work);
    if (mine !== visit) return;
    moved();
    update(found);
    await next();
  } finally {
    busy = false;
  }
}

function give(label) {
  if (!rows.length) return;
  const path = of("/rows/" + rows[0].row);
  return change(() => ask(path, { label }, "PUT"), () => rows.shift());
}

function undo() {
  if (!project.last) return;
  const { row, text } = project.last, path = of("/rows/" + row);
  return change(() => ask(path, undefined, "DELETE"), () => rows.unshift({ row, text }));
}

async function download(path, name) {
  const url = URL.createObjectURL(await (await answer(of(path))).blob()), link = make("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

async function settle(...given) {
  const mine = visit, found = await inTurn(() => ask(...given));
  if (mine !== visit) return;
  failed = null;
  update(found);
}

on("skip", "click", () => give(null));
on("undo", "click", undo);
on("relabel", "submit", async () => {
  await settle(of("/labels"), { labels: lines(at("all-labels").value) }, "PUT");
  at("change").open = false;
});
once("train-now", () => settle(of("/training"), undefined, "POST"));
once("cancel", () => settle(of("/training"), undefined, "DELETE"));
once("get-labels", () => download("/labels.csv", project.name + "-labels.csv"));
once("get-adapter", () => download("/adapter.zip", project.name + ".zip"));
on("remove", "click", async () => {
  if (!confirm("Delete the project " + project.name + " with its labels? Its adapter is served on.")) return;
  const mine = visit;
  await ask(of(), undefined, "DELETE");
  if (mine === visit) location.hash = "train";
});
on("sentence", "submit", async () => {
  const mine = visit;
  const found = await ask("v1/classify", { adapter: project.name, rows: [{ [project.column]: at("text").value }] });
  if (mine !== visit) return;
  bars(at("said"), found.predictions[0]);
});
document.addEventListener("keydown", event => {
  const other = event.ctrlKey || event.metaKey || event.altKey || event.repeat;
  if (at("project").hidden || other || event.target.closest("input, textarea, select")) return;
  const key = event.key.toLowerCase(), label = Object.keys(project.labels)[KEYS.indexOf(key)];
  if (key === "s") attempt(() => give(null));
  else if (key === "u") attempt(undo);
  else if (KEYS.includes(key) && label !== undefined) attempt(() => give(label));
  else return;
  event.preventDefault();
});

// The page that the address names.

async function show() {
  const [where, name] = location.hash.slice(1).split("/").map(decodeURIComponent);
  const sections = { try: "try", train: "train", project: "project" };
  const shown = sections[where] ?? "try";
  clearTimeout(polling);
  visit++;
  // A project is shown when the server has said what it is; until then no key is about the one before.
  for (const id of Object.values(sections)) at(id).hidden = id !== shown || id === "project";
  for (const id of ["try", "train"]) {
    if ((shown === "try") === (id === "try")) at("to-" + id).setAttribute("aria-current", "page");
    else at("to-" + id).removeAttribute("aria-current");
  }
  if (shown === "try") {
    await list();
    if (at("adapter").value && at("adapter").value !== task?.name) await choose();  // a text that was begun stays
  }
  if (shown === "project") await open(name);
  if (shown === "train") await projects();
}

async function begin() {
  if (!location.hash && !await list()) location.hash = "train";
  else await show();
}

on("token", "change", begin);
addEventListener("hashchange", () => attempt(show));
attempt(begin);
