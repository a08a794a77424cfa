// The page of `stiv serve`: asks for videos, watches them, shows them. No library and no build: browsers read it as it is.

const TOKEN = "stiv.token";
const PAGE = 12; // videos of a page
const SLOTS = 24; // empty places of a timeline at most; those of longer videos are spread evenly
const STREAMS = 2; // a browser opens six connections to a server, for all of its tabs together
const BUSY = 2_000; // ms between two looks while something is made: streams tell of steps, not of the queue
const IDLE = 15_000;
const SMALL = 128; // pixels of width below which they are shown as they are, not blurred

// Fields in their order: name, label, step, and where they stand. Bounds, choices and defaults are the model's.
const FIELDS = [
  ["width", "Width", 1, "fields"],
  ["height", "Height", 1, "fields"],
  ["num_frames", "Frames", 1, "fields"],
  ["num_inference_steps", "Steps", 1, "fields"],
  ["guidance_scale", "Guidance", "any", "fields"],
  ["seed", "Seed", 1, "fields"],
  ["fps", "Frames per second", "any", "more"],
  ["guidance_mode", "Guidance mode", null, "more"],
  ["image_guidance_scale", "Image guidance", "any", "more"],
  ["solver", "Solver", null, "more"],
  ["time_shift", "Time shift", "any", "more"],
  ["late_stretch", "Late stretch", "any", "more"],
  ["guidance_from", "Guidance from", "any", "more"],
  ["guidance_until", "Guidance until", "any", "more"],
  ["priority", "Priority", 1, "more"],
  ["guidance_renorm", "Renormalize", null, "more"],
  ["fit", "Pictures of another size", null, "fitting"],
];

const TIMES = ["time_shift", "late_stretch"];
const TUNED = ["solver", ...TIMES]; // what goes best with so many steps, where somebody has looked for it
const EMPTY = { seed: "any", priority: "0", guidance_from: "0", guidance_until: "1" }; // what the server takes where nothing is said

const $ = (id) => document.getElementById(id);
const copy = (id) => $(id).content.firstElementChild.cloneNode(true);
const done = (video) => video.status === "completed" || video.status === "failed";
const address = (id) => `/v1/videos/${encodeURIComponent(id)}`;

let model = null; // what /v1/models says under `stiv`
let proposed = null; // what the form shows of TUNED where nobody has chosen
let looking = null; // aborts the look at the list that is under way
const given = new Map(); // pictures by frame, {file, url}; the last frame is -1, however many there are
const turned = []; // ids after which the pages up to this one begin
const cards = new Map(); // by id: {item, video, urls, stream}

// --- the API

class Refusal extends Error {
  constructor(message, status, param) {
    super(message);
    Object.assign(this, { status, param });
  }
}

async function refusal(answer) {
  const found = await answer.json().catch(() => null);
  return new Refusal(found?.error?.message ?? `the server answers ${answer.status}`, answer.status, found?.error?.param);
}

async function call(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...options.headers, ...(token && { authorization: `Bearer ${token}` }) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  const error = await refusal(answer);
  if (answer.status === 401) closeDoor(token ? "This token is not known here." : "");
  throw error;
}

const json = async (path, options) => (await call(path, options)).json();

// EventSource cannot send a token, so the stream is read by hand.
async function* events(id, signal) {
  const answer = await call(`${address(id)}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const blocks = (text + part.value).split("\n\n");
    text = blocks.pop();
    yield* blocks.map(parsed).filter(Boolean);
  }
}

function parsed(block) {
  const found = /^event: (\w+)\ndata: (.*)$/.exec(block); // a comment says only that the connection lives
  return found && { kind: found[1], data: JSON.parse(found[2]) };
}

// --- telling people

function tell(line, message) {
  line.textContent = message;
  line.hidden = !message;
}

async function attempt(task, line = $("trouble")) {
  try {
    await task();
    tell(line, "");
  } catch (error) {
    if (error.name === "AbortError" || error.status === 401) return; // the door has said why
    tell(line, error instanceof TypeError ? "The server cannot be reached." : error.message);
    if (error.param) document.getElementsByName(error.param)[0]?.focus();
  }
}

function about(seconds) {
  if (seconds === null) return "";
  const [amount, unit] = seconds < 90 ? [seconds, "s"] : seconds < 5400 ? [seconds / 60, "min"] : [seconds / 3600, "h"];
  return `, about ${Math.ceil(amount)} ${unit}`;
}

function condition({ status, error, stiv }) {
  if (status === "completed") return "Done";
  if (status === "failed") return error.code === "cancelled" ? "Cancelled" : `Failed: ${error.message}`;
  if (status === "in_progress") return `Step ${stiv.step} of ${stiv.steps}${about(stiv.eta_s)}`;
  return `Waiting, ${stiv.queue_position ?? 0} before it${about(stiv.eta_s)}`;
}

// --- the door

function closeDoor(message) {
  sessionStorage.removeItem(TOKEN);
  for (const id of [...cards.keys()]) remove(id);
  $("room").hidden = $("forget").hidden = true;
  $("door").hidden = false;
  tell($("trouble"), message);
  $("token").focus();
}

async function open() {
  const [found] = (await json("/v1/models")).data;
  if (!model) describe(found);
  $("door").hidden = true;
  $("room").hidden = false;
  $("forget").hidden = !sessionStorage.getItem(TOKEN);
  await look();
}

function comeIn(event) {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value.trim());
  $("token").value = "";
  attempt(open);
}

// --- the form

function describe(found) {
  model = found.stiv;
  proposed = { ...model.defaults };
  $("model").textContent = found.id;
  for (const field of FIELDS) if (model.fields.includes(field[0])) addField(...field);
  for (const name of ["prompt", "negative_prompt"]) $(name).maxLength = model.limits.prompt[1];
  $("num_frames").addEventListener("input", () => $("num_frames").validity.valid && drawTimeline());
  for (const name of ["num_inference_steps", "solver"]) $(name)?.addEventListener("input", tune);
  drawTimeline();
}

// As `Tuned.grid` chooses: the nearest number of steps by its ratio, then what erred least. Fitted weights have their own,
// and what skips blocks is nobody's who did not ask for it.
function tunedFor(steps, solver) {
  const distance = (each) => Math.abs(Math.log(each.steps / steps));
  const whole = model.tuned.filter((each) => !each.skipped_steps.length);
  const known = whole.filter((each) => !each.fitted || each.steps === steps);
  const fit = known.filter((each) => (solver === null ? each.default : each.solver === solver));
  return fit.sort((a, b) => distance(a) - distance(b) || a.tried - b.tried)[0];
}

// Shows what goes with the steps, and with a solver that was chosen, in place of what was proposed before.
function tune() {
  const steps = Number($("num_inference_steps").value);
  if (!(steps > 0)) return;
  const solver = $("solver").value === String(proposed.solver) ? null : $("solver").value;
  const own = Object.fromEntries(TUNED.map((name) => [name, model.defaults[name]]));
  const next = { ...own, ...tunedFor(steps, null) };
  const { time_shift, late_stretch } = (solver && tunedFor(steps, solver)) || next;
  Object.assign(next, { time_shift, late_stretch });
  for (const name of TUNED) if ($(name).value === String(proposed[name])) $(name).value = next[name];
  proposed = next;
}

function addField(name, label, step, where) {
  const field = copy("field");
  field.querySelector("span").textContent = label;
  const input = model.choices[name] ? choices(name) : name === "guidance_renorm" ? checkbox(name) : number(name, step);
  field.append(Object.assign(input, { id: name, name }));
  $(where).append(field);
}

function choices(name) {
  const input = document.createElement("select");
  input.append(...model.choices[name].map((each) => new Option(each, each)));
  input.value = model.defaults[name] ?? (name === "fit" ? "crop" : input.value); // people drop photos of any size
  return input;
}

function checkbox(name) {
  const checked = model.defaults[name];
  return Object.assign(document.createElement("input"), { type: "checkbox", checked });
}

function number(name, step) {
  const [min, max] = bounds(name);
  const input = Object.assign(document.createElement("input"), { type: "number", min, max, step });
  if (name === "width" || name === "height") input.step = model.limits.pixel_multiple;
  if (name === "num_frames") input.step = model.limits.frame_multiple;
  input.value = model.defaults[name] ?? "";
  input.placeholder = EMPTY[name] ?? "";
  return input;
}

// Of sizes: the smallest and the largest that the engines were made for.
function bounds(name) {
  const range = { num_frames: "frames", width: "width", height: "height" }[name];
  if (!range) return model.limits[name];
  const each = model.buckets.map((bucket) => bucket[range]);
  return [Math.min(...each.map((one) => one.min)), Math.max(...each.map((one) => one.max))];
}

// What is as the model has it is left out: the server fills it in, with weights that are fitted to a solver's times. Of
// the times all are said where one was changed, or where the solver was and nobody has looked for its best.
function asked() {
  const body = new FormData();
  const solver = $("solver").value;
  const known = solver === String(proposed.solver) || tunedFor(Number($("num_inference_steps").value), solver);
  const timed = !known || TIMES.some((name) => $(name).value !== String(proposed[name]));
  for (const { name, type, value, checked } of $("ask").elements) {
    const said = type === "checkbox" ? String(checked) : value;
    const own = String((TUNED.includes(name) ? proposed : model.defaults)[name] ?? "");
    if (name && (said !== own || (timed && TIMES.includes(name)))) body.set(name, said);
  }
  body.set("prompt", $("prompt").value); // it may be empty, but not missing
  if (!given.size) body.delete("fit");
  for (const [frame, { file }] of given) body.set(`frames[${frame}]`, file);
  return body;
}

async function submit() {
  $("submit").disabled = true;
  await attempt(async () => {
    await call("/v1/videos", { method: "POST", body: asked() });
    turned.length = 0;
    await look();
    $("news").textContent = "The video is asked for.";
  }, $("refusal"));
  $("submit").disabled = false;
}

// --- the timeline

const count = () => Number($("num_frames").value);
const place = (frame) => (frame < 0 ? count() + frame : frame);
const frameAt = (index) => (index > 0 && index === count() - 1 ? -1 : index);

// Where a model knows only what comes after given frames, they are the first ones, one after the other.
function places() {
  const indices = new Set([...given.keys()].map(place));
  if (!model.tasks.includes("frames")) return [...indices, indices.size].sort((a, b) => a - b);
  const shown = Math.min(count(), SLOTS);
  for (let at = 0; at < shown; at++) indices.add(Math.round((at * (count() - 1)) / Math.max(1, shown - 1)));
  return [...indices].sort((a, b) => a - b);
}

function drawTimeline(focused = null) {
  $("timeline").replaceChildren(...places().map(slot));
  $("fitting").hidden = !given.size;
  if (focused !== null) $("timeline").querySelector(`[data-frame="${focused}"]`)?.focus();
}

function slot(index) {
  const item = copy("slot");
  const frame = given.has(index) ? index : frameAt(index);
  const [input, image, drop] = [item.querySelector("input"), item.querySelector("img"), item.querySelector(".drop")];
  item.querySelector(".at").textContent = index;
  input.accept = model.pictures.map((format) => `image/${format.toLowerCase()}`).join();
  input.ariaLabel = `Picture of frame ${index}`;
  input.dataset.frame = frame;
  input.addEventListener("change", () => give(frame, input.files[0]));
  drop.addEventListener("dragover", () => drop.classList.add("over"));
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => dropped(event, frame));
  if (given.has(frame)) drawGiven(item, image, frame, index);
  return item;
}

function drawGiven(item, image, frame, index) {
  const [move, clear] = [item.querySelector(".move"), item.querySelector(".clear")];
  Object.assign(image, { src: given.get(frame).url, hidden: false });
  item.querySelector(".given").hidden = false;
  Object.assign(move, { value: index, max: count() - 1, ariaLabel: `Frame of the picture that is at ${index}` });
  move.addEventListener("change", () => move.validity.valid && move.value && moved(frame, Number(move.value)));
  clear.ariaLabel = `Remove the picture of frame ${index}`;
  clear.addEventListener("click", () => give(frame, null));
}

function dropped(event, frame) {
  const file = [...event.dataTransfer.files].find((each) => each.type.startsWith("image/"));
  if (file) give(frame, file);
  else event.currentTarget.classList.remove("over");
}

function give(frame, file) {
  if (given.has(frame)) URL.revokeObjectURL(given.get(frame).url);
  given.delete(frame);
  if (file) given.set(frame, { file, url: URL.createObjectURL(file) });
  drawTimeline(frame);
}

function moved(frame, index) {
  const picture = given.get(frame);
  const target = frameAt(index);
  if (given.has(target)) return drawTimeline(frame); // it is taken: the number goes back
  given.delete(frame);
  given.set(target, picture);
  drawTimeline(target);
}

// --- the gallery

async function look() {
  looking?.abort();
  looking = new AbortController();
  const after = turned.length ? `&after=${encodeURIComponent(turned.at(-1))}` : "";
  try {
    show(await json(`/v1/videos?limit=${PAGE}${after}`, { signal: looking.signal }));
  } catch (error) {
    if (error.status !== 404 || !turned.length) throw error;
    turned.length = 0; // the video that this page came after is gone
    await look();
  }
}

function show({ data, has_more }) {
  const listed = new Set(data.map((video) => video.id));
  for (const id of [...cards.keys()]) if (!listed.has(id)) remove(id);
  data.forEach((video, at) => {
    const { item } = cards.get(video.id) ?? add(video);
    const there = $("gallery").children[at];
    if (there !== item) $("gallery").insertBefore(item, there ?? null);
    update(video);
  });
  $("none").hidden = data.length > 0 || turned.length > 0;
  $("newer").disabled = !turned.length;
  $("older").disabled = !has_more;
  $("older").dataset.after = data.at(-1)?.id ?? "";
  follow();
}

function add(video) {
  const item = copy("card");
  const card = { item, video: null, urls: new Map(), stream: null };
  cards.set(video.id, card);
  item.dataset.id = video.id;
  const on = (name, task) => item.querySelector(`.${name}`).addEventListener("click", () => attempt(() => task(card), item.querySelector(".error")));
  on("play", play);
  on("cancel", cancel);
  on("sheet", showSheet);
  on("mp4", (it) => save(it, "video", "mp4"));
  on("gif", (it) => save(it, "gif", "gif"));
  on("png", (it) => save(it, "spritesheet", "png"));
  on("again", again);
  on("delete", forget);
  item.querySelector(".screen").classList.toggle("pixels", parseInt(video.size) < SMALL);
  return card;
}

function remove(id) {
  const { item, urls, stream } = cards.get(id);
  stream?.abort();
  item.remove();
  cards.delete(id);
  for (const url of urls.values()) url.then(URL.revokeObjectURL, () => {});
}

// A list may have been made before what a stream has told since.
function older(video, known) {
  if (!known || known.stiv.attempts !== video.stiv.attempts) return false;
  return (done(known) && !done(video)) || video.stiv.step < known.stiv.step;
}

function update(video) {
  const card = cards.get(video.id);
  if (!card || older(video, card.video)) return;
  const before = card.video;
  card.video = video;
  draw(card);
  if (before && before.status !== video.status) $("news").textContent = `${video.prompt}: ${condition(video)}`;
  if (video.status === "completed" && before?.status !== "completed") attempt(() => showThumbnail(card), card.item.querySelector(".error"));
}

function draw({ item, video }) {
  const { stiv } = video;
  const part = (name) => item.querySelector(name);
  part("h3").textContent = video.prompt || "(no prompt)";
  part(".facts").textContent = `${video.size}, ${stiv.num_frames} frames, seed ${stiv.seed}`;
  part(".state").textContent = condition(video);
  part(".warnings").textContent = stiv.warnings.join(" ");
  Object.assign(part("progress"), { max: stiv.steps, value: stiv.step, hidden: done(video), ariaLabel: "Progress" });
  part(".cancel").hidden = done(video);
  for (const name of [".sheet", ".mp4", ".gif", ".png"]) part(name).hidden = video.status !== "completed";
  part(".screen").hidden = video.status !== "completed";
  if (done(video)) part(".preview").hidden = true;
  part(".play").hidden = Boolean(part("video"));
  part(".actions").ariaLabel = video.prompt;
}

// How it looks like becoming, as long as it is made.
function preview({ item, video }, src) {
  Object.assign(item.querySelector(".preview"), { src, hidden: done(video) });
}

// A video tag and a link cannot send a token: what is shown and saved is fetched here, once.
function content({ video, urls }, variant) {
  if (!urls.has(variant)) urls.set(variant, fetched(video.id, variant).catch((error) => forgotten(urls, variant, error)));
  return urls.get(variant);
}

async function fetched(id, variant) {
  const answer = await call(`${address(id)}/content?variant=${variant}`);
  return URL.createObjectURL(await answer.blob());
}

function forgotten(urls, variant, error) {
  urls.delete(variant);
  throw error;
}

async function showThumbnail(card) {
  card.item.querySelector(".play img").src = await content(card, "thumbnail");
}

async function play(card) {
  const screen = document.createElement("video");
  Object.assign(screen, { src: await content(card, "video"), controls: true, loop: true, playsInline: true });
  Object.assign(screen, { muted: true, autoplay: true }); // browsers begin by themselves only what is silent
  screen.ariaLabel = card.video.prompt;
  card.item.querySelector(".screen").append(screen);
  draw(card);
  screen.focus();
}

async function showSheet(card) {
  const image = $("sheet").querySelector("img");
  image.src = await content(card, "spritesheet");
  image.style.imageRendering = parseInt(card.video.size) < SMALL ? "pixelated" : "auto";
  $("sheet").showModal();
}

async function save(card, variant, suffix) {
  const href = await content(card, variant);
  Object.assign(document.createElement("a"), { href, download: `${card.video.id}.${suffix}` }).click();
}

async function cancel({ video }) {
  update(await json(`${address(video.id)}/cancel`, { method: "POST" }));
}

async function again({ video }) {
  const body = JSON.stringify({ seed: video.stiv.seed + 1 });
  await call(`${address(video.id)}/remix`, { method: "POST", body, headers: { "content-type": "application/json" } });
  turned.length = 0;
  await look();
  $("news").textContent = "The video is asked for once more.";
}

async function forget({ video }) {
  if (!confirm("Delete this video for good?")) return;
  await call(address(video.id), { method: "DELETE" });
  await look();
  $("jobs-title").focus();
}

function turn(task) {
  task();
  attempt(look);
}

// --- watching

// The first of those that are not done get a stream each; the list, which is looked at again and again, has the rest.
function follow() {
  const live = [...cards.values()].filter(({ video }) => !done(video));
  live.sort((a, b) => (a.video.stiv.queue_position ?? -1) - (b.video.stiv.queue_position ?? -1));
  const free = STREAMS - live.filter(({ stream }) => stream).length;
  for (const card of live.filter(({ stream }) => !stream).slice(0, Math.max(0, free))) watch(card);
}

async function watch(card) {
  card.stream = new AbortController();
  try {
    for await (const { kind, data } of events(card.video.id, card.stream.signal)) {
      if (kind === "video") update(data);
      if (kind === "preview") preview(card, data.image);
    }
  } catch {
    // a server that went away or a page that was hidden: the next look at the list begins again
  }
  card.stream = null;
}

// Nobody sees a hidden page: it leaves its connections to other tabs.
function rest() {
  for (const { stream } of cards.values()) if (document.hidden) stream?.abort();
  glance();
}

async function glance() {
  if (!document.hidden && $("door").hidden) await attempt(model ? look : open);
}

async function attend() {
  await attempt(open);
  for (;;) {
    const busy = [...cards.values()].some(({ video }) => !done(video));
    await new Promise((go) => setTimeout(go, busy ? BUSY : IDLE));
    await glance();
  }
}

$("door").addEventListener("submit", comeIn);
$("forget").addEventListener("click", () => closeDoor(""));
$("ask").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("ask").addEventListener("keydown", (event) => event.ctrlKey && event.key === "Enter" && $("ask").requestSubmit());
$("older").addEventListener("click", () => turn(() => turned.push($("older").dataset.after)));
$("newer").addEventListener("click", () => turn(() => turned.pop()));
$("sheet").querySelector("button").addEventListener("click", () => $("sheet").close());
// A picture that misses its place must not replace the page.
for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault());
document.addEventListener("visibilitychange", rest);
attend();
