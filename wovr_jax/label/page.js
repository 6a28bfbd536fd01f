/* The page: a film with a cursor, and a list of films. Every mark is sent at once; what is shown is what the server says. */

const PIECE = 32, SPEEDS = [2, 5, 10, 20, 40], PAUSE_MS = 450;
const WORDS = { success: "success", failure: "failure", discard: "discarded" };
const $ = (id) => document.getElementById(id);

const label = {
  socket: null, waiting: [], told: null, order: [], item: null, at: 0, speed: 2, timer: null, next: null,
  films: new Map(), loading: null, turn: Promise.resolve(),
};

/* ------------------------------------------------------------------ the server */

function connect() {
  const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`);
  socket.binaryType = "arraybuffer";
  label.socket = socket;
  label.waiting = [{ resolve: greet, reject: trouble }]; // the server speaks first
  socket.onmessage = ({ data }) => {
    const { resolve, reject } = label.waiting.shift();
    if (typeof data === "string") reject(data); else resolve(decode(data));
  };
  socket.onclose = () => {
    label.waiting.splice(0).forEach(({ reject }) => reject(""));
    pause();
    trouble("The connection to the server has ended. Is launch/label.py still running?");
  };
}

function ask(message) {
  return new Promise((resolve, reject) => {
    if (label.socket.readyState !== WebSocket.OPEN) return reject("");
    label.waiting.push({ resolve, reject });
    label.socket.send(encode(message));
  });
}

function trouble(said) {
  if (!said) return;
  $("trouble-said").textContent = said;
  if (!$("trouble").open) $("trouble").showModal();
}

function greet(told) {
  const before = label.item;
  Object.assign(label, { told, order: told.order, films: new Map(), loading: null });
  document.title = `Labels: ${told.folder}`;
  const judge = told.judge === null ? "" : ` The curve is the classifier of ${told.judge}, its threshold ${told.threshold.toFixed(2)}; ` +
    "recordings that it contradicts come first.";
  $("facts").textContent = `Folder ${told.folder}. Labels are saved at once to labels.json in it, as ${told.by}.${judge}`;
  drawList();
  open(before !== null && before < told.items.length ? before : label.order[0]);
}

/* ------------------------------------------------------------------ a recording */

const current = () => label.told.items[label.item];
const last = () => current().steps;

function open(number) {
  pause();
  clearTimeout(label.next);
  label.item = number;
  const item = current();
  $("instruction").textContent = item.instruction || "(no instruction)";
  $("about").textContent = `${item.recording}${item.episode ? `, episode ${item.episode}` : ""} \u00b7 ${item.actor} \u00b7 ` +
    `recorded as a ${item.won ? "success" : "failure"}`;
  $("line").setAttribute("aria-valuemax", last());
  for (const row of $("list").children) {
    const own = Number(row.firstChild.dataset.item) === number;
    row.firstChild.setAttribute("aria-current", own);
    if (own) reveal(row);
  }
  drawCurve();
  show(0);
  showLabel();
  load(number);
  play();
}

/** Scrolls the list, and only the list: on a phone it lies far below the film. */
function reveal(row) {
  const list = $("list");
  if (row.offsetTop < list.scrollTop + list.offsetTop) list.scrollTop = row.offsetTop - list.offsetTop;
  const below = row.offsetTop + row.offsetHeight - list.offsetTop - list.clientHeight;
  if (below > list.scrollTop) list.scrollTop = below;
}

/** Fetches the frames of a recording, a piece after another, and then the first piece of the next one. */
async function load(number) {
  if (!label.films.has(number)) {
    // Frames of a few recordings: a long one has a hundred megabytes.
    if (label.films.size >= 3) label.films.delete(label.films.keys().next().value);
    label.films.set(number, { frame: [], wrist: [], shape: null, small: null });
  }
  const film = label.films.get(number), steps = label.told.items[number].steps;
  label.loading = number;
  while (label.loading === number && label.item === number && film.frame.length <= steps) {
    let piece;
    try { piece = await ask({ do: "frames", item: number, low: film.frame.length, count: Math.min(PIECE, steps + 1 - film.frame.length) }); } catch (said) { return trouble(said); }
    if (piece.low !== film.frame.length) return; // asked for twice
    film.shape = piece.frame.shape.slice(1);
    film.small = piece.wrist && piece.wrist.shape.slice(1);
    cut(piece.frame, film.frame);
    if (piece.wrist) cut(piece.wrist, film.wrist);
    if (label.item !== number) return;
    if (piece.low === 0) resize();
    $("loaded").style.width = `${(100 * film.frame.length) / (steps + 1)}%`;
    if (label.at < film.frame.length && label.at >= piece.low) show(label.at);
  }
  $("loaded").style.width = "0";
}

function cut({ shape, data }, frames) {
  const size = shape[1] * shape[2] * shape[3];
  for (let i = 0; i < shape[0]; i++) frames.push(data.subarray(i * size, (i + 1) * size));
}

function paint(canvas, data, [height, width]) {
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d"), picture = context.createImageData(width, height);
  for (let i = 0, o = 0; i < data.length; i += 3) {
    picture.data[o++] = data[i]; picture.data[o++] = data[i + 1]; picture.data[o++] = data[i + 2]; picture.data[o++] = 255;
  }
  context.putImageData(picture, 0, 0);
}

function show(at) {
  label.at = Math.max(0, Math.min(last(), at));
  const film = label.films.get(label.item);
  if (film && film.frame.length > label.at) {
    paint($("frame"), film.frame[label.at], film.shape);
    if (film.small) paint($("wrist"), film.wrist[label.at], film.small);
  }
  $("cursor").style.left = `${place(label.at)}%`;
  $("line").setAttribute("aria-valuenow", label.at);
  const prob = current().prob, says = prob ? `, classifier ${prob.data[label.at].toFixed(2)}` : "";
  $("step").textContent = `Frame ${label.at} of ${last()}${says} \u00b7 ${SPEEDS[label.speed]} frames a second`;
}

/** Where a frame stands on the line, in percent; its own stretch begins there. */
const place = (frame) => (100 * frame) / (last() + 1);

/* ------------------------------------------------------------------ playing */

function play() {
  pause();
  label.timer = setInterval(() => {
    const film = label.films.get(label.item);
    if (!film || (film.frame.length <= label.at + 1 && label.at < last())) return; // waits for the next piece
    if (label.at >= last()) return pause();
    show(label.at + 1);
  }, 1000 / SPEEDS[label.speed]);
}

function pause() {
  clearInterval(label.timer);
  label.timer = null;
}

function togglePlay() {
  if (label.timer !== null) return pause();
  if (label.at >= last()) show(0);
  play();
}

function step(by) { pause(); show(label.at + by); }

function speed(by) {
  label.speed = Math.max(0, Math.min(SPEEDS.length - 1, label.speed + by));
  if (label.timer !== null) play();
  show(label.at);
}

/* ------------------------------------------------------------------ marks */

/** What would be written, before a change: the label, or what the recording itself says. */
function now(number) {
  const { label: own, won } = label.told.items[number];
  return own || { outcome: won ? "success" : "failure", first_success: null, lies_from: null };
}

/** One request after another, in the order of the keys: whoever presses fast loses none. */
function inTurn(work) {
  label.turn = label.turn.then(work).catch(trouble);
}

function mark(change, goesOn) {
  const number = label.item;
  clearTimeout(label.next);
  inTurn(async () => {
    const { outcome, first_success, lies_from } = { ...now(number), ...change(now(number)) };
    take(await ask({ do: "mark", item: number, outcome, first_success, lies_from }));
    if (goesOn && $("go-on").checked) label.next = setTimeout(() => { if (label.item === number) goNext(); }, PAUSE_MS);
  });
}

// A moment that was marked stays where the outcome is said once more.
const decide = (outcome) =>
  mark((before) => ({ outcome, first_success: outcome === "success" ? before.first_success : null }), true);

function markMoment() {
  pause();
  const { at } = label;
  mark((before) => ({ outcome: "success", first_success: before.first_success === at ? null : at }), false);
}

function markLie() {
  pause();
  const { at } = label;
  mark((before) => ({ lies_from: before.lies_from === at ? null : at }), false);
}

function undo() {
  clearTimeout(label.next);
  inTurn(async () => {
    const undone = await ask({ do: "undo" });
    if (undone.item !== label.item) open(undone.item);
    take(undone);
    verdict(`Undone; ${undone.label ? "what was said before counts again" : "it has no label again"}.`);
  });
}

function take({ item, label: own }) {
  label.told.items[item].label = own;
  drawRow(item);
  count();
  if (item === label.item) showLabel();
}

function goNext() {
  const from = label.order.indexOf(label.item), { order } = label;
  for (let i = 1; i <= order.length; i++) {
    const number = order[(from + i) % order.length];
    if (!label.told.items[number].label) return number === label.item ? null : open(number);
  }
  verdict("All of them are labelled.");
}

function move(by) {
  const to = label.order.indexOf(label.item) + by;
  if (to >= 0 && to < label.order.length) open(label.order[to]);
}

/* ------------------------------------------------------------------ what is shown */

function showLabel() {
  const item = current(), own = item.label;
  for (const outcome of Object.keys(WORDS)) $(outcome).setAttribute("aria-pressed", Boolean(own) && own.outcome === outcome);
  const said = now(label.item), won = said.outcome === "success", first = said.first_success;
  $("won").hidden = !won;
  $("won").style.left = `${place(first === null ? last() : first)}%`;
  $("won").classList.toggle("vague", first === null);
  $("lies").hidden = said.lies_from === null;
  $("lies").style.left = `${place(said.lies_from || 0)}%`;
  $("said").textContent = own ? `${WORDS[own.outcome]}, said ${own.by || "somebody"}, ${own.at.slice(0, 16).replace("T", " ")} UTC` : "no label yet";
  const parts = [];
  if (own && won) parts.push(first === null ? "A success; nobody has marked where it begins." : `A success from frame ${first} on.`);
  if (own && !won) parts.push(own.outcome === "failure" ? "A failure." : "Discarded: nothing learns from it.");
  if (own && own.lies_from !== null) parts.push(`It lies from frame ${own.lies_from} on.`);
  verdict(parts.join(" ") || `Recorded as a ${item.won ? "success" : "failure"}. What do you say?`);
}

function verdict(said) { $("verdict").textContent = said || "\u00a0"; }

function drawCurve() {
  const { prob } = current(), { threshold } = label.told;
  $("curve").replaceChildren();
  if (!prob) return;
  const path = (d, name = "") => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", "path");
    element.setAttribute("d", d);
    element.setAttribute("class", name);
    $("curve").append(element);
  };
  const y = (value) => 96 - 92 * value, x = (frame) => place(frame + 0.5);
  path(`M0 ${y(threshold)}H100`, "limit");
  path(Array.from(prob.data, (value, i) => `${i ? "L" : "M"}${x(i)} ${y(value)}`).join(""));
}

function drawList() {
  $("list").replaceChildren(...label.order.map((number) => {
    const row = document.createElement("li"), button = document.createElement("button");
    button.dataset.item = number;
    button.onclick = () => open(number);
    button.append(...["dot", "name", "says", "more"].map((name) => Object.assign(document.createElement("span"), { className: name })));
    row.append(button);
    return row;
  }));
  label.order.forEach(drawRow);
  count();
}

function drawRow(number) {
  const item = label.told.items[number], button = document.querySelector(`#list [data-item="${number}"]`);
  const [, name, says, more] = button.children;
  button.className = item.label ? item.label.outcome : "";
  name.textContent = item.instruction || item.recording;
  says.textContent = item.label ? WORDS[item.label.outcome] : item.won ? "success?" : "failure?";
  more.textContent = `${item.recording}${item.episode ? ` #${item.episode}` : ""} \u00b7 ${item.steps} steps`;
  if (item.against > 0) {
    more.prepend(Object.assign(document.createElement("span"), { className: "against", textContent: "the classifier disagrees \u00b7 " }));
  }
}

function count() {
  const { items } = label.told, left = items.filter((item) => !item.label).length;
  $("left").textContent = left ? `${left} of ${items.length} left` : `All ${items.length} labelled`;
  $("bar").firstElementChild.style.width = `${(100 * (items.length - left)) / items.length}%`;
}

/** Whole pixels of a frame on whole pixels of the screen, as many as fit; larger frames are made to fit. */
function resize() {
  const film = label.told && label.films.get(label.item);
  if (!film || !film.shape) return;
  const ratio = devicePixelRatio || 1, gap = innerWidth > 900 ? 20 : 12;
  $("beside").hidden = !film.small;
  const widths = [film.shape[1], ...(film.small ? [film.small[1]] : [])], whole = widths.reduce((sum, width) => sum + width);
  const room = ($("views").clientWidth - gap * (widths.length - 1)) / whole;
  const high = Math.max(innerHeight * 0.5, 160) / Math.max(film.shape[0], film.small ? film.small[0] : 0);
  const fits = Math.min(room, high) * ratio, scale = (fits > 1 ? Math.floor(fits) : fits) / ratio;
  for (const [id, shape] of [["frame", film.shape], ["wrist", film.small]]) {
    if (shape) Object.assign($(id).style, { width: `${shape[1] * scale}px`, height: `${shape[0] * scale}px` });
  }
  show(label.at);
}

/* ------------------------------------------------------------------ keys, mouse, touch */

const COMMANDS = {
  " ": togglePlay, s: () => decide("success"), f: () => decide("failure"), d: () => decide("discard"),
  m: markMoment, l: markLie, u: undo, n: goNext, Enter: goNext,
  ArrowUp: () => move(-1), ArrowDown: () => move(1), Home: () => step(-Infinity), End: () => step(Infinity),
  "-": () => speed(-1), "+": () => speed(1), "=": () => speed(1),
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("trouble").open || label.item === null) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  // A control that was reached by Tab keeps the keys that it needs itself.
  const control = event.target instanceof HTMLButtonElement || event.target instanceof HTMLInputElement;
  if (control && (key === " " || key === "Enter")) return;
  if (key === "ArrowLeft" || key === "ArrowRight") step((key === "ArrowLeft" ? -1 : 1) * (event.shiftKey ? 10 : 1));
  else if (key in COMMANDS && !(event.repeat && "sfdmlun".includes(key))) COMMANDS[key]();
  else return;
  event.preventDefault();
});

function seek(event) {
  const box = $("line").getBoundingClientRect();
  pause();
  show(Math.floor(((event.clientX - box.left) / box.width) * (last() + 1)));
}
$("line").addEventListener("pointerdown", (event) => { $("line").setPointerCapture(event.pointerId); seek(event); });
$("line").addEventListener("pointermove", (event) => { if ($("line").hasPointerCapture(event.pointerId)) seek(event); });
$("views").addEventListener("click", togglePlay);

for (const outcome of Object.keys(WORDS)) $(outcome).addEventListener("click", () => decide(outcome));
for (const [id, follow] of [["moment", markMoment], ["lie", markLie], ["undo", undo]]) $(id).addEventListener("click", follow);
$("trouble-again").addEventListener("click", () => { $("trouble").close(); if (label.socket.readyState > WebSocket.OPEN) connect(); });
// Who used a control with the pointer wants the keys for the film again; who came by Tab goes on with Tab.
addEventListener("click", ({ detail }) => detail && !$("trouble").open && setTimeout(() => document.activeElement && document.activeElement.blur()));
addEventListener("resize", resize);

connect();
