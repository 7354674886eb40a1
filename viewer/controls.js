// The page around the splats: camera, keys, pictures of a server, the bar. The scene comes as JSON:
//   up [3], background [3], near, cameras [{name, test, place, turn, fx, fy, width, height, psnr}], start: number of a camera
//   server: what view.py adds, see viewer/server.py

const scene = JSON.parse(document.getElementById("scene").textContent);
const $ = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const server = scene.server || null;
const look = { mode: "color", scale: 1, degree: 3, background: scene.background, near: scene.near };
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const plus = (a, b, k = 1) => [0, 1, 2].map((i) => a[i] + k * b[i]);
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const unit = (a) => a.map((v) => v / (Math.hypot(...a) || 1));
const column = (turn, k) => [turn[k], turn[3 + k], turn[6 + k]]; // 0 right, 1 down, 2 forward, in the world

let splats = null, camera = null, distance = 1, at = -1, source = "browser";
let version = 0, drawn = -1, busy = false, moved = 0, share = 1, next = null;
window.__ready = false;

// Camera

function lookFrom(place, forward) {
  const right = unit(cross(forward, scene.up)), down = cross(forward, right);
  return { place, turn: [0, 1, 2].flatMap((i) => [right[i], down[i], forward[i]]), fx: 800, fy: 800, width: 800, height: 600 };
}

// Where the splats are and how far they reach, as far as that is known.
function model() {
  return splats?.count ? splats : { middle: [0, 0, 0], radius: 1, ...server };
}

// What all cameras look at: the point closest to their axes; else the middle of the splats.
function middle() {
  if (scene.cameras.length < 2) return model().middle;
  const a = Array(9).fill(0), b = [0, 0, 0];
  for (const { place, turn } of scene.cameras) {
    const f = column(turn, 2);
    for (let i = 0; i < 3; i++)
      for (let j = 0; j < 3; j++) {
        const m = (i === j) - f[i] * f[j];
        a[3 * i + j] += m, b[i] += m * place[j];
      }
  }
  const c = [a.slice(0, 3), a.slice(3, 6), a.slice(6)], det = dot(c[0], cross(c[1], c[2]));
  if (Math.abs(det) < 1e-6 * scene.cameras.length ** 3) return model().middle;
  return [dot(b, cross(c[1], c[2])) / det, dot(c[0], cross(b, c[2])) / det, dot(c[0], cross(c[1], b)) / det];
}

function show(view, number = -1) {
  camera = { ...view }, at = number;
  const ahead = dot(plus(middle(), camera.place, -1), column(camera.turn, 2));
  distance = ahead > 0 ? ahead : model().radius;
  $.camera.value = at;
  $.compare.hidden = !(server?.photos && at >= 0);
  if (!$.compare.hidden) $.photo.src = `photo?${query({ camera: at })}`;
  $.photo.hidden = $.compare.hidden || $.split.value === "0";
  for (const option of $.mode.options) option.hidden = option.value === "error" && $.compare.hidden;
  if (look.mode === "error" && $.compare.hidden) $.mode.value = look.mode = "color";
  say(about());
  changed();
}

function start() {
  const said = new URLSearchParams(location.hash.slice(1)), view = (said.get("view") || "").split(",").map(Number);
  if ([...$.mode.options].some((option) => option.value === said.get("mode"))) $.mode.value = look.mode = said.get("mode");
  if (view.length === 16 && view.every(Number.isFinite) && view.slice(12).every((v) => v > 0))
    return show({ place: view.slice(0, 3), turn: view.slice(3, 12), fx: view[12], fy: view[13], width: view[14], height: view[15] });
  const number = Number(said.get("camera") ?? scene.start ?? -1);
  if (scene.cameras[number]) return show(scene.cameras[number], number);
  const forward = unit(cross(scene.up, Math.abs(scene.up[0]) < 0.9 ? [-1, 0, 0] : [0, 0, 1]));
  show(lookFrom(plus(middle(), forward, -2.5 * model().radius), forward));
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
  const axes = [0, 1, 2].map((k) => rotate(column(camera.turn, k)));
  camera.turn = [0, 1, 2].flatMap((i) => axes.map((v) => v[i]));
  camera.place = plus(about, rotate(plus(camera.place, about, -1)));
}

function orbit(x, y, here = false) {
  const about = here ? camera.place : plus(camera.place, column(camera.turn, 2), distance);
  turned(scene.up, -x, about);
  const steep = dot(column(camera.turn, 2), scene.up);
  const before = { ...camera };
  turned(column(camera.turn, 0), -y, about);
  const now = dot(column(camera.turn, 2), scene.up);
  if (Math.abs(now) > 0.995 && Math.abs(now) > Math.abs(steep)) camera = before; // not over the pole
  free();
}

function move(right, down, forward) {
  camera.place = [right, down, forward].reduce((p, by, k) => plus(p, column(camera.turn, k), by * distance), camera.place);
  free();
}

function nearer(factor) {
  camera.place = plus(camera.place, column(camera.turn, 2), distance * (1 - factor));
  distance *= factor;
  free();
}

function zoom(factor) {
  camera.fx *= factor, camera.fy *= factor;
  free();
}

// The camera is no longer one of the data set.
function free() {
  if (at >= 0) {
    const kept = distance;
    show(camera);
    distance = kept;
  }
  changed();
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
  clearTimeout(next);
  if (!busy) requestAnimationFrame(picture);
}

// One picture at a time, of the newest camera: small while it moves, whole when it rests.
async function picture() {
  if (busy || !camera) return;
  busy = true;
  const begun = version, whole = performance.now() - moved > 150 || share === 1;
  const local = source === "browser" && splats?.count && look.mode !== "error";
  try {
    await (local ? inBrowser(whole ? 1 : share) : fromServer(whole));
    marks();
    if (begun === version && whole) link();
    if (begun === version && whole) drawn = version, (window.__ready = true);
  } catch (error) {
    say(error.message);
    drawn = version;
  }
  busy = false;
  if (drawn !== version) setTimeout(() => requestAnimationFrame(picture), begun === version ? 160 - (performance.now() - moved) : 0);
}

async function inBrowser(part) {
  const begun = performance.now(), size = [$.picture.width, $.picture.height].map((v) => Math.max(1, Math.round(v * part)));
  const sorting = splats.sort(camera, look.near);
  if (splats.ms > Math.max(40, splats.took)) splats.draw(camera, look, size); // in the order of the last picture, for now
  await sorting;
  splats.draw(camera, look, size);
  await splats.finished();
  $.exact.hidden = true;
  const took = performance.now() - begun;
  splats.took = took;
  share = Math.min(1, Math.max(0.25, took > 80 ? part * 0.7 : took < 25 ? part * 1.3 : part));
}

async function fromServer(whole) {
  if (!server) return;
  const part = whole ? 1 : 0.5, [w, h] = [$.picture.width, $.picture.height].map((v) => Math.max(1, Math.round(v * part)));
  const own = at >= 0 ? { camera: at } : { view: [...camera.place, ...camera.turn, ...lensAt(camera, w, h)].join() };
  const reply = await fetch(`frame?${query({ ...own, w, h, mode: look.mode, scale: look.scale, degree: look.degree, still: +whole, source })}`);
  if (!reply.ok) throw new Error(await reply.text());
  const old = $.exact.src;
  $.exact.src = URL.createObjectURL(await reply.blob());
  await $.exact.decode();
  if (old) URL.revokeObjectURL(old);
  $.exact.hidden = false;
  share = 0.5;
  const wait = Number(reply.headers.get("X-Next"));
  if (wait && whole) next = setTimeout(again, 1000 * wait); // training goes on
}

function query(values) {
  return new URLSearchParams({ t: server.token, iteration: $.iteration.value, ...values });
}

function resize() {
  const scale = Math.min(window.devicePixelRatio || 1, 2);
  for (const canvas of [$.picture, $.marks])
    (canvas.width = Math.max(1, Math.round(innerWidth * scale))), (canvas.height = Math.max(1, Math.round(innerHeight * scale)));
  changed();
}

// Cameras of the data set as pyramids: train blue, test orange.
function marks() {
  const pen = $.marks.getContext("2d"), { width: w, height: h } = $.marks;
  pen.clearRect(0, 0, w, h);
  if (!$.frames.checked) return;
  const lens = lensAt(camera, w, h), size = 0.06 * distance;
  scene.cameras.forEach((other, i) => {
    if (i === at) return;
    const [x, y] = [(size * other.width) / other.fx / 2, (size * other.height) / other.fy / 2];
    const corners = [[0, 0, 0], [-x, -y, size], [x, -y, size], [x, y, size], [-x, y, size]].map((c) =>
      onScreen(c.reduce((p, by, k) => plus(p, column(other.turn, k), by), other.place), lens));
    pen.strokeStyle = other.test ? "#fa3" : "#49f";
    pen.beginPath();
    for (const [a, b] of [[0, 1], [0, 2], [0, 3], [0, 4], [1, 2], [2, 3], [3, 4], [4, 1]])
      if (corners[a] && corners[b]) pen.moveTo(...corners[a]), pen.lineTo(...corners[b]);
    pen.stroke();
    pen.fillStyle = pen.strokeStyle;
    if (corners[4] && scene.cameras.length <= 100) pen.fillText(named(other), ...corners[4]);
  });
}

function onScreen(point, [fx, fy, cx, cy]) {
  const away = plus(point, camera.place, -1), [x, y, z] = [0, 1, 2].map((k) => dot(away, column(camera.turn, k)));
  return z > 0.01 * distance ? [(fx * x) / z + cx, (fy * y) / z + cy] : null;
}

function pick(x, y) {
  if (!$.frames.checked) return;
  const scale = $.marks.width / innerWidth, lens = lensAt(camera, $.marks.width, $.marks.height);
  let best = 15 * scale, found = -1;
  scene.cameras.forEach((other, i) => {
    const seen = i !== at && onScreen(other.place, lens), away = seen ? Math.hypot(seen[0] - x * scale, seen[1] - y * scale) : Infinity;
    if (away < best) (best = away), (found = i);
  });
  if (found >= 0) show(scene.cameras[found], found);
}

// Mouse, touch, keys

const fingers = new Map();
let travelled = 0;
$.stage.onpointerdown = (event) => {
  if (!camera) return; // nothing is loaded yet
  $.stage.setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, event);
  travelled = 0;
};
$.stage.onpointerup = $.stage.onpointercancel = (event) => {
  if (fingers.size === 1 && travelled < 4 && event.type === "pointerup") pick(event.clientX, event.clientY);
  fingers.delete(event.pointerId);
};
$.stage.onpointermove = (event) => {
  const before = fingers.get(event.pointerId), others = [...fingers.values()].filter((f) => f.pointerId !== event.pointerId);
  if (!before) return;
  const x = event.clientX - before.clientX, y = event.clientY - before.clientY, pan = 1 / lensAt(camera, innerWidth, innerHeight)[0];
  travelled += Math.hypot(x, y);
  if (others.length) {
    const away = (f) => Math.hypot(f.clientX - others[0].clientX, f.clientY - others[0].clientY) || 1;
    nearer(away(before) / away(event));
    move((-x / 2) * pan, (-y / 2) * pan, 0);
  } else if (event.buttons & 6 || event.shiftKey) move(-x * pan, -y * pan, 0);
  else orbit(0.005 * x, 0.005 * y);
  fingers.set(event.pointerId, event);
};
$.stage.oncontextmenu = (event) => event.preventDefault();
$.stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  if (camera) nearer(Math.exp(Math.max(-1, Math.min(1, event.deltaY * 0.002))));
}, { passive: false });

const KEYS = {
  w: () => move(0, 0, 0.05), s: () => move(0, 0, -0.05), a: () => move(-0.05, 0, 0), d: () => move(0.05, 0, 0),
  q: () => move(0, 0.05, 0), e: () => move(0, -0.05, 0),
  ArrowLeft: () => orbit(0.05, 0, true), ArrowRight: () => orbit(-0.05, 0, true),
  ArrowUp: () => orbit(0, 0.05, true), ArrowDown: () => orbit(0, -0.05, true),
  "+": () => zoom(1.05), "-": () => zoom(1 / 1.05), "[": () => step(-1), "]": () => step(1),
  m: () => choose($.mode, [...$.mode.options].filter((o) => !o.hidden)[($.mode.selectedIndex + 1) % $.mode.options.length]?.value || "color"),
  f: () => $.framed.hidden || $.frames.click(), r: () => (address("#"), start()),
  k: () => (path.push({ ...camera }), keysShown(path.length - 1)), h: () => ($.help.hidden = !$.help.hidden),
};
addEventListener("keydown", (event) => {
  if (!camera || event.ctrlKey || event.altKey || event.metaKey || /SELECT|INPUT/.test(event.target.tagName) || !KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});

function step(by) {
  const count = scene.cameras.length;
  if (count) show(scene.cameras[(at + by + count) % count], (at + by + count) % count);
}

function choose(select, value) {
  select.value = value;
  select.onchange();
}

// A path of the camera through keys: shown here, saved as nerfstudio's camera_path.json, drawn by render.py --path

const path = [];
let playing = 0;

function keysShown(chosen) {
  $.path.hidden = !path.length;
  $.keys.replaceChildren(...path.map((_, i) => new Option(`key ${i + 1} of ${path.length}`, i)));
  $.keys.value = Math.max(0, Math.min(chosen, path.length - 1));
}

function moveKey(by) {
  const i = +$.keys.value, other = i + by;
  if (!path[other]) return;
  [path[i], path[other]] = [path[other], path[i]];
  keysShown(other);
}

// Between key i and the next, 0 <= s <= 1: Catmull-Rom for places and axes, which are then made a rotation again.
function between(i, s) {
  const count = path.length, loop = $.loop.checked;
  const key = (k) => path[loop ? (k + count) % count : Math.max(0, Math.min(count - 1, k))];
  const [a, b, c, d] = [-1, 0, 1, 2].map((k) => key(i + k));
  const mixed = (of) => [0, 1, 2].map((n) => {
    const [p, q, r, t] = [a, b, c, d].map((view) => of(view)[n]);
    return q + 0.5 * s * (r - p + s * (2 * p - 5 * q + 4 * r - t + s * (3 * (q - r) + t - p)));
  });
  const forward = unit(mixed((view) => column(view.turn, 2))), right = unit(cross(mixed((view) => column(view.turn, 1)), forward));
  const axes = [right, cross(forward, right), forward], blend = (name) => Math.exp((1 - s) * Math.log(b[name]) + s * Math.log(c[name]));
  return { ...b, place: mixed((view) => view.place), turn: [0, 1, 2].flatMap((n) => axes.map((v) => v[n])), fx: blend("fx"), fy: blend("fy") };
}

function play() {
  const begun = performance.now(), parts = $.loop.checked ? path.length : path.length - 1;
  const step = () => {
    const u = ((performance.now() - begun) / 1000 / +$.seconds.value) * parts;
    if (!playing || (u >= parts && !$.loop.checked)) return stop();
    show(between(Math.floor(u) % Math.max(1, parts), u % 1));
    playing = requestAnimationFrame(step);
  };
  const stop = () => ((playing = 0), ($.play.textContent = "play"));
  if (playing || parts < 1) return stop();
  playing = 1, ($.play.textContent = "stop");
  step();
}

function pathFile() {
  const degrees = (view) => (360 / Math.PI) * Math.atan(view.height / 2 / view.fy), seconds = +$.seconds.value;
  const matrix = ({ place: p, turn: r }) => [0, 1, 2].flatMap((i) => [r[3 * i], -r[3 * i + 1], -r[3 * i + 2], p[i]]).concat([0, 0, 0, 1]);
  const keyframes = path.map((view) => ({ matrix: matrix(view), fov: degrees(view), aspect: view.width / view.height,
    override_transition_enabled: false, override_transition_sec: null }));
  return { camera_type: "perspective", render_width: path[0].width, render_height: path[0].height, fps: 30, seconds,
    is_cycle: $.loop.checked, smoothness_value: 0, default_fov: degrees(path[0]), default_transition_sec: seconds / path.length,
    keyframes, camera_path: [] };
}

async function save() {
  const text = JSON.stringify(pathFile());
  if (server?.saves) {
    const reply = await fetch(`path?${query({})}`, { method: "POST", body: text });
    return say(await reply.text());
  }
  const link = Object.assign(document.createElement("a"), { download: "camera_path.json" });
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.click();
  say("camera_path.json: render.py --path draws it");
}

$.keys.onchange = () => show(path[$.keys.value]);
$.earlier.onclick = () => moveKey(-1);
$.later.onclick = () => moveKey(1);
$.drop.onclick = () => (path.splice($.keys.value, 1), keysShown(+$.keys.value));
$.play.onclick = play;
$.save.onclick = save;

// The bar

function say(text) {
  $.said.textContent = text;
}

function about() {
  if (window.__error) return window.__error;
  return `${at >= 0 ? `${named(scene.cameras[at])}; ` : ""}${splats?.count ? `${splats.count.toLocaleString("en")} splats; ` : ""}h: keys`;
}

function named(view) {
  return view.psnr ? `${view.name} ${view.psnr.toFixed(2)} dB` : view.name;
}

function fill(select, pairs) {
  select.replaceChildren(...pairs.map(([value, text]) => new Option(text, value)));
  select.hidden = pairs.length < 2;
}

const isSplats = server?.splats ?? true; // a field of rays has no centers, ellipsoids, sizes and SH
fill($.mode, [...MODES.slice(0, isSplats ? 6 : 4), ...(server?.photos ? ["error"] : [])].map((mode) => [mode, mode]));
$.scale.parentElement.hidden = $.degree.parentElement.hidden = !isSplats;
fill($.camera, [[-1, "free view"], ...scene.cameras.map((c, i) => [i, `${c.test ? "test" : "train"} ${named(c)}`])]);
fill($.iteration, (server?.iterations || []).map((i) => [i, `iteration ${i}`]));
fill($.source, server?.sources || [["browser", ""]]);
$.framed.hidden = !scene.cameras.length;
$.mode.onchange = () => ((look.mode = $.mode.value), changed());
$.scale.oninput = () => ((look.scale = +$.scale.value), changed());
$.degree.oninput = () => ((look.degree = +$.degree.value), changed());
$.frames.onchange = changed;
$.camera.onchange = () => ($.camera.value < 0 ? free() : show(scene.cameras[$.camera.value], +$.camera.value));
$.split.oninput = () => {
  $.photo.hidden = $.split.value === "0";
  $.photo.style.clipPath = `inset(0 ${100 - $.split.value}% 0 0)`;
};
$.source.onchange = async () => {
  source = $.source.value === "floats" ? "browser" : $.source.value;
  if (source === "browser") await load($.source.value === "floats" ? 1 : 0);
  changed();
};
$.iteration.onchange = $.source.onchange;

async function load(exact) {
  say("loading");
  try {
    splats = splats || new Splats($.picture, { floats: !new URLSearchParams(location.hash.slice(1)).has("bytes") });
    await splats.load(server ? await fetched(`splats?${query({ exact })}`) : unpacked($.payload.textContent));
    $.degree.max = Math.max(splats.degree, 0), ($.degree.value = look.degree = splats.degree);
    say(about());
  } catch (error) {
    say(error.message);
    if (!splats && choices(["exact", "training"])) $.source.value = source = choices(["exact", "training"]);
    else window.__error = error.message;
  }
}

// The first of these sources that there is.
function choices(names) {
  return names.find((name) => [...$.source.options].some((option) => option.value === name));
}

// A run that trains: what it says once a second, its loss and the number of splats as curves, and a button.
async function watch() {
  try {
    const told = JSON.parse(new TextDecoder().decode(await fetched(`state?${query({})}`)));
    if (told.live) {
      const loss = told.losses?.loss ? `, loss ${told.losses.loss.toFixed(4)}` : "";
      say(`iteration ${told.iteration} of ${told.iterations}, ${(told.gaussians || 0).toLocaleString("en")} splats${loss}`);
      if (!told.paused && $.pause.textContent === "resume") changed();
      $.pause.textContent = told.paused ? "resume" : "pause";
      curve(told.curve);
    } else say("the run has ended; the last picture stays");
    $.pause.hidden = !told.live;
  } catch (error) {
    say(error.message);
  }
  setTimeout(watch, 1000);
}

function curve(points) {
  $.curve.toggleAttribute("hidden", points.length < 2);
  if (points.length < 2) return;
  const first = points[0][0], last = points[points.length - 1][0];
  $.curve.querySelectorAll("path").forEach((path, k) => {
    const values = points.map((p) => p[k + 1]), low = Math.min(...values), high = Math.max(...values);
    const at = (p) => `${((p[0] - first) / (last - first)).toFixed(4)},${((high - p[k + 1]) / (high - low || 1)).toFixed(4)}`;
    path.setAttribute("d", `M${points.map(at).join("L")}`);
  });
}

$.pause.onclick = async () => {
  const reply = await fetch(`pause?${query({ on: +($.pause.textContent === "pause") })}`, { method: "POST" });
  if (!reply.ok) return say(await reply.text());
  $.pause.textContent = $.pause.textContent === "pause" ? "resume" : "pause";
  changed();
};

async function fetched(url) {
  const reply = await fetch(url);
  if (!reply.ok) throw new Error(await reply.text());
  return new Uint8Array(await reply.arrayBuffer());
}

function unpacked(base64) {
  const text = atob(base64.trim()), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

// A file dropped on the page takes the model's place.
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", async (event) => {
  event.preventDefault();
  const file = event.dataTransfer.files[0];
  if (!file || !splats) return;
  try {
    await splats.load(new Uint8Array(await file.arrayBuffer()));
    source = "browser";
    changed();
  } catch (error) {
    say(error.message);
  }
});

async function begin() {
  resize();
  $.picture.addEventListener("webglcontextlost", () => say("the browser has lost its graphics: reload the page"));
  addEventListener("resize", resize);
  addEventListener("hashchange", () => camera && start());
  source = $.source.value || "browser";
  if (source !== "exact" && source !== "training") await load(source === "floats" ? 1 : 0);
  if (source === "floats") source = "browser";
  start();
  if (server?.live) watch();
}
begin();
