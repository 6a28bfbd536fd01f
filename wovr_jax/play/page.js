/* The page: a clock that shows one frame a tick and, meanwhile, records one command of the next chunk a tick. */

const TICK_MS = 100, IDLE_TICK_MS = 50, STARTS = 24;
const KEYS = {
  ArrowLeft: "left", ArrowRight: "right", ArrowUp: "up", ArrowDown: "down",
  a: "left", d: "right", w: "up", s: "down", q: "up_high", e: "down_low",
};
const $ = (id) => document.getElementById(id);

const play = {
  hello: null, socket: null, waiting: [], epoch: 0,
  episode: null, queue: [], asked: false, shown: 0, room: 1,
  held: new Set(), tapped: new Set(), push: null, closed: false, sentClosed: false,
  tape: [], now: [], driver: "person", recorded: [], place: { layout: 1 }, noise: 0,
  starts: [], kind: "initial", toFrame: null, timer: null, shownAt: -Infinity, until: null,
};

/* ------------------------------------------------------------------ the server */

function connect() {
  const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`);
  socket.binaryType = "arraybuffer";
  play.socket = socket;
  socket.onmessage = ({ data }) => {
    if (typeof data === "string") return (play.waiting.shift() || { reject: trouble }).reject(data);
    const message = decode(data);
    if (message.told === "hello") return greet(message);
    play.waiting.shift().resolve(message);
  };
  socket.onclose = ({ code, reason }) => {
    play.waiting.splice(0).forEach(({ reject }) => reject(""));
    pause();
    const said = { 1013: `${reason}; one is free when somebody closes the page.`, 4000: "You were away for a while, and your place was given to others." };
    trouble(said[code] || "The connection to the server has ended. Is launch/play.py still running?");
  };
}

function ask(message) {
  return new Promise((resolve, reject) => {
    if (play.socket.readyState !== WebSocket.OPEN) return reject("");
    play.waiting.push({ resolve, reject });
    play.socket.send(encode(message));
  });
}

function trouble(said) {
  if (!said) return;
  $("trouble-said").textContent = said;
  if (!$("trouble").open) $("trouble").showModal();
}

async function greet(hello) {
  play.hello = hello;
  const [height, width] = hello.frame;
  for (const id of ["true", "imagined"]) Object.assign($(id), { width, height });
  document.title = `Two worlds: ${hello.run}`;
  if (!hello.simulator) {
    $("true").hidden = true;
    $("absent").hidden = false;
    $("absent").textContent = "The true simulator of LIBERO cannot be played in this version. The world model imagines what follows from a start state that was recorded.";
    document.querySelector('#sees [value="true"]').disabled = true;
    $("random").disabled = true;
  }
  $("keys-high").hidden = !("up_high" in hello.moves);
  $("temperature").max = Math.max(2, hello.temperature);
  const made = { sft: "imitates demonstrations; it samples", grpo: "learned on imagined frames; it samples" };
  const learned = made[hello.policy.split("-")[0]] || "samples";
  $("about-policy").textContent = `${hello.policy} ${learned} at temperature ${hello.temperature}. A robot would be greedy.`;
  const judged = hello.threshold === null ? "no judge yet" : `the judge's threshold is ${hello.threshold.toFixed(2)}`;
  $("facts").textContent = `Run ${hello.run}, ${hello.suite}. Policy ${hello.policy}, world model ${hello.world}; ${judged}. ` +
    `A pixel differs where the other picture has no similar colour there or next to it; above ${(100 * hello.apart).toFixed(1)}% imagination has left the truth.`;
  // A start that a fresh pair of eyes has not seen before, or a recorded one where nothing draws layouts.
  play.place = hello.simulator ? { layout: Math.floor(Math.random() * 2 ** 31) } : { row: 0 };
  listStarts(play.kind);
  await begin(play.place);
  resize();
}

/* ------------------------------------------------------------------ an episode */

async function begin(place, noise = Math.floor(Math.random() * 2 ** 31)) {
  play.place = place;
  play.noise = noise;
  pause();
  drivenBy("person");
  await rewind({ do: "begin", noise, ...place }, null);
  markStart();
}

async function again() {
  const before = play.episode.apart.length ? play.episode.apart : null;
  pause();
  await rewind({ do: "again", noise: Math.floor(Math.random() * 2 ** 31) }, before);
  drivenBy("recorded");
  schedule(TICK_MS);
}

async function rewind(message, before) {
  const epoch = ++play.epoch;
  // Commands of the episode that is left are not for the next one.
  Object.assign(play, { queue: [], tape: [], now: [], recorded: [], asked: false });
  let begun;
  try { begun = await ask(message); } catch (said) { return trouble(said); }
  if (epoch !== play.epoch) return;
  const { shape, data } = begun.action;
  const size = shape[1] * shape[2];
  play.recorded = Array.from({ length: shape[0] }, (_, n) => data.slice(n * size, (n + 1) * size));
  play.episode = {
    imagined: [begun.imagined.data], true: begun.true ? [begun.true.data] : [], prob: [], truth: [], apart: [],
    left: null, offset: begun.step, before,
  };
  Object.assign(play, { shown: 0, room: play.hello.most_chunks, closed: begun.closed, sentClosed: begun.closed });
  $("instruction").textContent = begun.instruction || "(an instruction that the run does not name)";
  for (const id of ["again", "film"]) $(id).disabled = true;
  showFingers();
  showFrame(0);
}

/* ------------------------------------------------------------------ the clock */

function schedule(ms) {
  if (play.timer === null) play.timer = setTimeout(tick, ms);
}

function pause() {
  clearTimeout(play.timer);
  play.timer = null;
}

function tick() {
  play.timer = null;
  const { queue, hello, tape } = play, showing = queue.length > 0;
  if (showing) {
    add(queue.shift());
    play.shownAt = performance.now();
    showFrame(play.episode.imagined.length - 1);
  }
  if (play.driver === "person" && !play.asked && tape.length < hello.chunk && (showing || tape.length || wanted())) {
    tape.push(sample());
  }
  if (!queue.length && !play.asked) askNext();
  showTape();
  const recording = play.driver === "person" && tape.length > 0 && !play.asked;
  if (queue.length) schedule(TICK_MS);
  else if (recording) schedule(showing ? TICK_MS : IDLE_TICK_MS);
  else if (showing && play.asked) schedule(TICK_MS);
}

/** Asks for the next chunk, if whoever drives has one. */
function askNext() {
  const { hello, driver, tape } = play;
  if (play.room <= 0) return full();
  if (driver === "policy") {
    const steps = play.episode.offset + play.episode.imagined.length - 1;
    if (play.until && steps >= play.until) return drivenBy("person");
    return request({ do: "act", sees: document.querySelector("#sees :checked").value, temperature: Number($("temperature").value) });
  }
  if (driver === "recorded") {
    if (!play.recorded.length) return drivenBy("person");
    return request({ do: "step", action: new Ndarray([hello.chunk, hello.rest.length], play.recorded.shift()) });
  }
  if (tape.length < hello.chunk) return;
  play.tape = [];
  // Nothing was asked for: the worlds stand still until something is.
  if (tape.every((command) => command.rest) && play.closed === play.sentClosed) return;
  play.sentClosed = tape[tape.length - 1].action[hello.rest.length - 1] > 0;
  request({ do: "step", action: new Ndarray([hello.chunk, hello.rest.length], Float32Array.from(tape.flatMap(({ action }) => action))) });
}

async function request(message) {
  const epoch = play.epoch;
  play.asked = true;
  let chunk;
  try { chunk = await ask(message); } catch (said) {
    if (epoch === play.epoch) { play.asked = false; drivenBy("person"); trouble(said); }
    return;
  }
  if (epoch !== play.epoch) return;
  play.asked = false;
  play.room = chunk.room;
  const { imagined, action } = chunk, [steps, height, width] = imagined.shape, size = height * width * 3;
  const dim = action.shape[1];
  play.now = [];
  for (let t = 0; t < steps; t++) {
    const part = ({ data }) => data.subarray(t * size, (t + 1) * size);
    play.queue.push({
      imagined: part(imagined), true: chunk.true && part(chunk.true), prob: chunk.prob && chunk.prob.data[t],
      truth: chunk.truth && Boolean(chunk.truth.data[t]), apart: chunk.apart && chunk.apart.data[t], left: chunk.left,
    });
    play.now.push(Array.from(action.data.subarray(t * dim, (t + 1) * dim)));
  }
  if (play.driver !== "person") { play.closed = play.now[steps - 1][dim - 1] > 0; play.sentClosed = play.closed; showFingers(); }
  pause();
  // In the pace of the frames before: an answer that comes early waits for its turn.
  schedule(Math.max(0, TICK_MS - (performance.now() - play.shownAt)));
}

function add(frame) {
  const { episode } = play;
  episode.imagined.push(frame.imagined);
  if (frame.true) episode.true.push(frame.true);
  if (frame.prob !== null) episode.prob.push(frame.prob);
  if (frame.truth !== null) episode.truth.push(frame.truth);
  if (frame.apart !== null) episode.apart.push(frame.apart);
  if (frame.left !== null && frame.left < episode.imagined.length - 1) episode.left = frame.left;
  for (const id of ["again", "film"]) $(id).disabled = false;
}

function full() {
  drivenBy("person");
  play.tape = [];
  verdict("", "This episode is as long as it may be. Start over to go on.");
}

/* ------------------------------------------------------------------ commands */

const wanted = () => play.held.size || play.tapped.size || play.push || play.closed !== play.sentClosed;

/** The command of this moment: what is held, what was tapped since the last one, and the fingers. */
function sample() {
  const { hello } = play, action = hello.rest.slice(), names = new Set([...play.held, ...play.tapped]);
  play.tapped.clear();
  const addMove = (name, share) => (hello.moves[name] || []).forEach((value, i) => { action[i] += share * value; });
  const fingers = action.length - 1;
  if (play.push) {
    addMove(play.push.x > 0 ? "right" : "left", Math.abs(play.push.x));
    addMove(play.push.y > 0 ? "down" : "up", Math.abs(play.push.y));
  }
  names.forEach((name) => addMove(name, 1));
  for (let i = 0; i < fingers; i++) action[i] = Math.max(-1, Math.min(1, action[i] - hello.rest[i]));
  const rest = action.slice(0, fingers).every((value) => value === 0);
  action[fingers] = play.closed ? 1 : -1;
  return { action, rest };
}

function drivenBy(driver) {
  play.driver = driver;
  $("policy").setAttribute("aria-pressed", driver === "policy");
  $("policy").firstElementChild.textContent = driver === "policy" ? "\u25a0 Stop" : "\u25b6 Start";
  if (driver !== "person") play.tape = [];
}

/** Somebody has touched the controls: they drive from now on. */
function take() {
  if (play.driver !== "person") drivenBy("person");
  play.recorded = [];
  if (!play.hello || !play.episode) return;
  if (play.shown !== play.episode.imagined.length - 1) showFrame(play.episode.imagined.length - 1);
  if (!play.asked && !play.queue.length) schedule(0);
}

function toggleFingers() {
  play.closed = !play.closed;
  showFingers();
  take();
}

function togglePolicy() {
  if (!play.episode) return;
  if (play.driver === "policy") return drivenBy("person");
  drivenBy("policy");
  play.recorded = [];
  // As long as an episode of the run; from its end on, as long as it is let.
  const steps = play.episode.offset + play.episode.imagined.length - 1 + play.queue.length;
  play.until = steps < play.hello.steps ? play.hello.steps : null;
  if (!play.asked && !play.queue.length) schedule(0);
}

/* ------------------------------------------------------------------ what is shown */

function paint(canvas, data, height = canvas.height, width = canvas.width) {
  const context = canvas.getContext("2d"), picture = context.createImageData(width, height);
  for (let i = 0, o = 0; i < data.length; i += 3) {
    picture.data[o++] = data[i]; picture.data[o++] = data[i + 1]; picture.data[o++] = data[i + 2]; picture.data[o++] = 255;
  }
  context.putImageData(picture, 0, 0);
}

function showFrame(step) {
  const { episode, hello } = play;
  play.shown = step;
  paint($("imagined"), episode.imagined[step]);
  if (episode.true.length) paint($("true"), episode.true[step]);
  const prob = step > 0 && episode.prob.length >= step ? episode.prob[step - 1] : null;
  const says = (id, said, won) => { $(id).textContent = said; $(id).className = won ? "says won" : "says"; };
  says("says-imagined", prob === null ? "" : `judge ${prob.toFixed(2)}`, prob !== null && prob > hello.threshold);
  if (hello.simulator) {
    const won = step > 0 && episode.truth[step - 1];
    says("says-true", won ? "success" : step ? `step ${episode.offset + step}` : "", won);
  }
  const gone = episode.left !== null && step > episode.left;
  $("view-imagined").classList.toggle("left", gone);
  tell(step, gone);
  play.toFrame = drawChart($("chart"), episode, hello, step);
}

function tell(step, gone) {
  const { episode, hello } = play;
  const paid = hello.threshold !== null && episode.prob.slice(0, step).some((prob) => prob > hello.threshold);
  const won = episode.truth.slice(0, step).some(Boolean);
  const left = gone ? `Imagination left the truth at step ${episode.offset + episode.left + 1}.` : "";
  if (paid && won) return verdict("both", "Done, in both worlds.", left);
  if (paid && hello.simulator) return verdict("false", "Imagination says that it is done. In truth it is not.", left);
  if (won && hello.threshold !== null) return verdict("truth", "It is done in truth, and imagination has not seen it.", left);
  if (paid) return verdict("false", "Imagination says that it is done.");
  if (won) return verdict("truth", "It is done in truth.", left);
  if (gone) return verdict("left", left, "The two pictures show different things from here on.");
  if (step) return verdict("", hello.simulator ? "So far imagination tells the truth." : "");
  const touch = matchMedia("(pointer: coarse)").matches;
  verdict("", touch ? "Push the round pad to move." : "Press an arrow key to move, the space bar to close the fingers.",
    "Every eight moves are imagined at once: while they play, you choose the next eight.");
}

function verdict(kind, said, more = "") {
  const at = $("verdict");
  if (at.dataset.said === said + more) return;
  at.dataset.said = said + more;
  at.className = kind;
  at.textContent = said || "\u00a0";
  if (more) at.append(" ", Object.assign(document.createElement("span"), { className: "soft", textContent: more }));
}

/** An arrow in the direction of a command; a dot for none. */
function arrow(action) {
  const { moves } = play.hello, along = (name) => moves[name].reduce((sum, value, i) => (i < action.length - 1 ? sum + value * action[i] : sum), 0);
  const x = along("right"), y = along("down");
  if (Math.hypot(x, y) < 0.02) return '<svg viewBox="-6 -6 12 12"><circle r="1.4"/></svg>';
  return `<svg viewBox="-6 -6 12 12"><path transform="rotate(${Math.round((Math.atan2(y, x) * 180) / Math.PI)})" d="M5.5 0L0-4.5V-1.5H-5.5V1.5H0V4.5Z"/></svg>`;
}

function showTape() {
  const { hello, tape, now, queue } = play, playing = now.length && queue.length ? now.length - queue.length - 1 : now.length - 1;
  const fill = (id, actions, on) => {
    $(id).innerHTML = Array.from({ length: hello.chunk }, (_, t) => {
      const action = actions[t], shut = action && action[action.length - 1] > 0;
      return `<li class="${action ? "set" : ""} ${shut ? "shut" : ""} ${t === on ? "on" : ""}">${action ? arrow(action) : ""}</li>`;
    }).join("");
  };
  fill("now", now, queue.length || play.timer ? playing : -1);
  fill("next", play.driver === "person" ? tape.map(({ action }) => action) : [], -1);
}

function showFingers() {
  $("fingers").setAttribute("aria-pressed", play.closed);
  $("fingers").lastElementChild.textContent = play.closed ? "Open the fingers" : "Close the fingers";
}

/** Whole pixels of a frame on whole pixels of the screen, as many as fit. */
function resize() {
  if (!play.hello) return;
  const room = Math.min($("views").clientWidth / 2 - ($("views").clientWidth > 500 ? 10 : 6), Math.max(innerHeight * 0.6, 160));
  const width = play.hello.frame[1], ratio = devicePixelRatio || 1;
  const side = width < room * ratio ? (Math.floor((room * ratio) / width) * width) / ratio : room;
  document.documentElement.style.setProperty("--side", `${side}px`);
  $("views").classList.add("sized");
  if (play.episode) showFrame(play.shown);
  showTape();
}

/* ------------------------------------------------------------------ where to begin */

async function listStarts(kind, more = false) {
  const { hello } = play, range = kind === "initial" ? [0, hello.initials] : [hello.initials, hello.starts];
  if (kind !== play.kind || !more) { play.kind = kind; play.starts = []; $("starts").replaceChildren(); }
  for (const name of ["initial", "keyframe"]) $(`tab-${name}`).setAttribute("aria-pressed", name === kind);
  $("about-starts").textContent = kind === "initial" ? "First moments of episodes that the run recorded."
    : "Moments shortly before an episode of the run went wrong.";
  const low = range[0] + play.starts.length, count = Math.min(STARTS, range[1] - low);
  if (count <= 0) {
    $("more").hidden = true;
    if (!play.starts.length) $("about-starts").textContent = "This run has none of these yet.";
    return;
  }
  let page;
  try { page = await ask({ do: "starts", low, count }); } catch (said) { return trouble(said); }
  if (kind !== play.kind) return;
  const [rows, height, width] = page.frame.shape, size = height * width * 3;
  for (let k = 0; k < rows; k++) {
    const row = page.row.data[k], tile = document.createElement("button"), canvas = document.createElement("canvas");
    Object.assign(canvas, { width, height });
    paint(canvas, page.frame.data.subarray(k * size, (k + 1) * size));
    tile.title = `${page.instruction[k]}${page.keyframe[k] ? `, from step ${page.step.data[k]}` : ""}`;
    tile.setAttribute("aria-label", tile.title);
    tile.dataset.row = row;
    tile.append(canvas);
    tile.onclick = () => begin({ row });
    play.starts.push(row);
    $("starts").append(tile);
  }
  $("more").hidden = range[0] + play.starts.length >= range[1];
  markStart();
}

function markStart() {
  for (const tile of $("starts").children) tile.setAttribute("aria-pressed", Number(tile.dataset.row) === play.place.row);
}

/* ------------------------------------------------------------------ keys, mouse, touch */

/** Keys that the focused control needs itself; see below how seldom one is focused. */
const belongsTo = (target, key) =>
  (target instanceof HTMLInputElement && key.startsWith("Arrow")) || (target instanceof HTMLButtonElement && key === " ");

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("trouble").open) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key, name = KEYS[key];
  if (belongsTo(event.target, key)) return;
  if (name && play.hello && name in play.hello.moves) {
    event.preventDefault();
    if (!event.repeat) { play.held.add(name); play.tapped.add(name); take(); }
  } else if (key === " ") {
    event.preventDefault();
    if (!event.repeat) toggleFingers();
  } else if (key === "r" && !event.repeat) begin(play.place);
  else if (key === "p" && !event.repeat) togglePolicy();
});
addEventListener("keyup", (event) => {
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (KEYS[key]) play.held.delete(KEYS[key]);
});
addEventListener("blur", () => { play.held.clear(); release(); });

function pushAt(event) {
  const box = $("pad").getBoundingClientRect(), reach = box.width / 2 - 23;
  let x = (event.clientX - box.left - box.width / 2) / reach, y = (event.clientY - box.top - box.height / 2) / reach;
  const length = Math.hypot(x, y);
  if (length > 1) { x /= length; y /= length; }
  $("knob").style.translate = `${x * reach}px ${y * reach}px`;
  play.push = Math.hypot(x, y) < 0.15 ? null : { x, y };
  take();
}
function release() {
  play.push = null;
  $("pad").classList.remove("held");
  $("knob").style.translate = "";
}
$("pad").addEventListener("pointerdown", (event) => { $("pad").setPointerCapture(event.pointerId); $("pad").classList.add("held"); pushAt(event); });
$("pad").addEventListener("pointermove", (event) => { if ($("pad").hasPointerCapture(event.pointerId)) pushAt(event); });
for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) $("pad").addEventListener(end, release);

function lookBack(event) {
  if (!play.episode || play.queue.length || play.asked || !play.toFrame) return;
  const step = play.toFrame(event.clientX - $("chart").getBoundingClientRect().left);
  showFrame(Math.max(0, Math.min(play.episode.imagined.length - 1, step)));
}
$("chart").addEventListener("pointermove", lookBack);
$("chart").addEventListener("pointerdown", lookBack);
$("chart").addEventListener("pointerleave", () => {
  if (play.episode && !play.queue.length) showFrame(play.episode.imagined.length - 1);
});

// Who used a control with the pointer wants the keys for driving again; who came by Tab goes on with Tab.
const letGo = () => setTimeout(() => document.activeElement && document.activeElement.blur());
addEventListener("click", ({ detail }) => detail && !$("trouble").open && letGo());
$("temperature").addEventListener("pointerup", letGo);

const press = (id, follow) => $(id).addEventListener("click", follow);
press("fingers", toggleFingers);
press("reset", () => begin(play.place));
press("policy", togglePolicy);
press("again", again);
press("random", () => begin({ layout: Math.floor(Math.random() * 2 ** 31) }));
press("tab-initial", () => listStarts("initial"));
press("tab-keyframe", () => listStarts("keyframe"));
press("more", () => listStarts(play.kind, true));
press("trouble-again", () => { $("trouble").close(); if (play.socket.readyState > WebSocket.OPEN) connect(); });
press("film", async () => {
  $("film").disabled = true;
  try {
    const { mp4 } = await ask({ do: "film" });
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(new Blob([mp4], { type: "video/mp4" })), download: `${play.hello.run}-two-worlds.mp4` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  } catch (said) { trouble(said); }
  $("film").disabled = false;
});
$("temperature").addEventListener("input", () => {
  const value = Number($("temperature").value);
  $("warmth").textContent = value ? value.toFixed(1) : "greedy";
});
addEventListener("resize", resize);


connect();
