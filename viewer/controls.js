// The page around the splats: camera, mouse, keys, the bar. The scene comes as JSON:
//   up [3], background [3], near, middle [3], radius: what the cameras look at, and from how far
//   cameras [{name, test, place, turn, fx, fy, width, height, psnr}], start: number of a camera

const $ = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const scene = JSON.parse($.scene.textContent);
const look = { mode: "color", scale: 1, degree: 3, background: scene.background, near: scene.near };
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const plus = (a, b, k = 1) => [0, 1, 2].map((i) => a[i] + k * b[i]);
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const unit = (a) => a.map((v) => v / (Math.hypot(...a) || 1));
const column = (turn, k) => [turn[k], turn[3 + k], turn[6 + k]]; // 0 right, 1 down, 2 forward, in the world
const turnOf = (columns) => [0, 1, 2].flatMap((i) => columns.map((v) => v[i]));

let splats = null, camera = null, distance = 1, at = -1, size = [1, 1];
let version = 0, drawn = -1, busy = true, moved = 0, share = 1;

// What view.py's page does in its own way: see server.js.
const site = { load: () => load(unpacked($.payload.textContent)), draw: inBrowser, shown() {} };

// Camera

function show(view, number = -1) {
  camera = { ...view }, at = number;
  const ahead = dot(plus(scene.middle, camera.place, -1), column(camera.turn, 2));
  distance = ahead > 0 ? ahead : scene.radius;
  $.camera.value = at;
  site.shown();
  say(about());
  changed();
}

function start() {
  const said = new URLSearchParams(location.hash.slice(1)), view = (said.get("view") || "").split(",").map(Number);
  if ([...$.mode.options].some((option) => option.value === said.get("mode"))) $.mode.value = look.mode = said.get("mode");
  const [fx, fy, width, height] = view.slice(12);
  if (view.length === 16 && view.every(Number.isFinite) && Math.min(fx, fy, width, height) > 0)
    return show({ place: view.slice(0, 3), turn: view.slice(3, 12), fx, fy, width, height });
  const number = Number(said.get("camera") ?? scene.start);
  if (scene.cameras[number]) return show(scene.cameras[number], number);
  const forward = unit(cross(scene.up, Math.abs(scene.up[0]) < 0.9 ? [-1, 0, 0] : [0, 0, 1]));
  const right = unit(cross(forward, scene.up));
  const place = plus(scene.middle, forward, -2.5 * scene.radius), turn = turnOf([right, cross(forward, right), forward]);
  show({ place, turn, fx: 800, fy: 800, width: 800, height: 600 });
}

function address(hash) {
  try {
    history.replaceState(null, "", hash);
  } catch { /* a page within a page has no address of its own */ }
}

function link() {
  const { place, turn, fx, fy, width, height } = camera;
  const numbers = [...place, ...turn, fx, fy, width, height].map((v) => +v.toPrecision(8));
  address(`#${at >= 0 ? `camera=${at}` : `view=${numbers}`}&mode=${look.mode}`);
}

// Turn the camera about a point by an angle in radians.
function turned(axis, angle, about) {
  const s = Math.sin(angle), c = Math.cos(angle);
  const rotate = (v) => plus(plus(v.map((x) => x * c), cross(axis, v), s), axis, dot(axis, v) * (1 - c));
  camera.turn = turnOf([0, 1, 2].map((k) => rotate(column(camera.turn, k))));
  camera.place = plus(about, rotate(plus(camera.place, about, -1)));
}

function orbit(x, y, here = false) {
  const about = here ? camera.place : plus(camera.place, column(camera.turn, 2), distance);
  const steep = () => Math.abs(dot(column(camera.turn, 2), scene.up));
  turned(scene.up, -x, about);
  const before = { ...camera }, was = steep();
  turned(column(camera.turn, 0), -y, about);
  if (steep() > Math.max(0.995, was)) camera = before; // not over the pole
  free();
}

function move(right, down, forward) {
  camera.place = [right, down, forward].reduce((p, by, k) => plus(p, column(camera.turn, k), by * distance), camera.place);
  free();
}

function nearer(factor) {
  move(0, 0, 1 - factor);
  distance *= factor;
}

function zoom(factor) {
  camera.fx *= factor, camera.fy *= factor;
  free();
}

// The camera is no longer one of the data set.
function free() {
  const kept = distance;
  if (at >= 0) show(camera);
  distance = kept;
  changed();
}

function step(by) {
  const count = scene.cameras.length, number = (at + by + count) % count;
  if (count) show(scene.cameras[number], number);
}

// Pictures

function changed() {
  moved = performance.now();
  again();
}

// Another picture of the same view.
function again() {
  version++;
  window.__ready = false;
  if (!busy) requestAnimationFrame(picture);
}

// One picture at a time, of the newest camera: small while it moves, whole when it rests.
async function picture() {
  if (busy) return;
  busy = true;
  const begun = version, whole = performance.now() - moved > 150 || share === 1;
  try {
    await site.draw(whole);
    if (begun === version && whole) link(), drawn = version, (window.__ready = true);
  } catch (error) {
    say(error.message);
    drawn = version;
  }
  busy = false;
  const rest = begun === version ? 160 - (performance.now() - moved) : 0;
  if (drawn !== version) setTimeout(() => requestAnimationFrame(picture), rest);
}

// The size of a picture, whole or part of it.
const sized = (part) => size.map((v) => Math.max(1, Math.round(v * part)));

async function inBrowser(whole) {
  if (!splats?.count) return;
  const begun = performance.now(), part = whole ? 1 : share, sorting = splats.sort(camera, look.near);
  // A sort that takes long: in the order of the last picture, for now.
  if (splats.ms > Math.max(40, splats.took)) splats.draw(camera, look, sized(part));
  await sorting;
  splats.draw(camera, look, sized(part));
  await splats.finished();
  const took = splats.took = performance.now() - begun;
  share = Math.min(1, Math.max(0.25, took > 80 ? part * 0.7 : took < 25 ? part * 1.3 : part));
}

function resize() {
  const scale = Math.min(window.devicePixelRatio || 1, 2);
  size = [innerWidth * scale, innerHeight * scale];
  changed();
}

// Mouse, touch, keys

const fingers = new Map();
$.stage.onpointerdown = (event) => {
  $.stage.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, event);
};
$.stage.onpointerup = $.stage.onpointercancel = (event) => fingers.delete(event.pointerId);
$.stage.onpointermove = (event) => {
  const before = fingers.get(event.pointerId), other = [...fingers.values()].find((f) => f.pointerId !== event.pointerId);
  if (!before) return;
  const x = event.clientX - before.clientX, y = event.clientY - before.clientY;
  const pan = 1 / lensAt(camera, innerWidth, innerHeight)[0];
  if (other) {
    const away = (f) => Math.hypot(f.clientX - other.clientX, f.clientY - other.clientY) || 1;
    nearer(away(before) / away(event));
    move((-x / 2) * pan, (-y / 2) * pan, 0);
  } else if (event.buttons & 6 || event.shiftKey) move(-x * pan, -y * pan, 0);
  else orbit(0.005 * x, 0.005 * y);
  fingers.set(event.pointerId, event);
};
$.stage.oncontextmenu = (event) => event.preventDefault();
$.stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  nearer(Math.exp(Math.max(-1, Math.min(1, event.deltaY * 0.002))));
}, { passive: false });

const KEYS = {
  w: () => move(0, 0, 0.05), s: () => move(0, 0, -0.05), a: () => move(-0.05, 0, 0), d: () => move(0.05, 0, 0),
  q: () => move(0, 0.05, 0), e: () => move(0, -0.05, 0),
  ArrowLeft: () => orbit(0.05, 0, true), ArrowRight: () => orbit(-0.05, 0, true),
  ArrowUp: () => orbit(0, 0.05, true), ArrowDown: () => orbit(0, -0.05, true),
  "+": () => zoom(1.05), "-": () => zoom(1 / 1.05), "[": () => step(-1), "]": () => step(1),
  m: () => choose($.mode, [...$.mode.options].filter((o) => !o.hidden)[$.mode.selectedIndex + 1]?.value || "color"),
  r: () => (address("#"), start()), h: () => ($.help.hidden = !$.help.hidden),
};
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || /SELECT|INPUT/.test(event.target.tagName) || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});

function choose(select, value) {
  select.value = value;
  select.onchange();
}

// The bar

function say(text) {
  $.said.textContent = text;
}

function about() {
  if (window.__error) return window.__error;
  const parts = [at >= 0 && named(scene.cameras[at]), splats?.count && `${splats.count.toLocaleString("en")} splats`];
  return [...parts, "h: keys"].filter(Boolean).join("; ");
}

function named(view) {
  return view.psnr ? `${view.name} ${view.psnr.toFixed(2)} dB` : view.name;
}

function fill(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
  select.hidden = pairs.length < 2;
}

fill($.mode, MODES.map((mode) => [mode, mode]));
fill($.camera, [[-1, "free view"], ...scene.cameras.map((c, i) => [i, `${c.test ? "test" : "train"} ${named(c)}`])]);
$.mode.onchange = () => ((look.mode = $.mode.value), changed());
$.scale.oninput = () => ((look.scale = +$.scale.value), changed());
$.degree.oninput = () => ((look.degree = +$.degree.value), changed());
$.camera.onchange = () => ($.camera.value < 0 ? free() : show(scene.cameras[$.camera.value], +$.camera.value));

async function load(bytes) {
  say("loading");
  splats = splats || new Splats($.picture);
  await splats.load(bytes);
  $.degree.value = look.degree = $.degree.max = splats.degree;
  say(about());
}

function unpacked(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function begin() {
  resize();
  start();
  $.picture.addEventListener("webglcontextlost", () => say("the browser has lost its graphics: reload the page"));
  Object.assign(window, { onresize: resize, onhashchange: start });
  try {
    await site.load();
  } catch (error) {
    say((window.__error = error.message));
  }
  busy = false;
  changed();
}
