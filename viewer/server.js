// What the page of view.py has beyond one that stands alone: pictures of our rasterizer, photos, cameras drawn into
// the scene, saved iterations, paths of the camera, a run that trains. scene.server comes from viewer/server.py.

const server = scene.server;
let source = "browser", next = null;

// Pictures

site.draw = async (whole) => {
  const local = source === "browser" && splats?.count && look.mode !== "error";
  await (local ? inBrowser(whole) : fromServer(whole));
  if (local) $.exact.hidden = true;
  marks();
};

async function fromServer(whole) {
  clearTimeout(next);
  const [w, h] = sized(whole ? 1 : 0.5);
  const own = at >= 0 ? { camera: at } : { view: [...camera.place, ...camera.turn, ...lensAt(camera, w, h)].join() };
  const reply = await asked("frame", { ...own, w, h, mode: look.mode, scale: look.scale, degree: look.degree, still: +whole, source });
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

async function asked(what, values = {}, options = {}) {
  const reply = await fetch(`${what}?${query(values)}`, options);
  if (!reply.ok) throw new Error(await reply.text());
  return reply;
}

// Whatever it is, its failure is said.
const tried = (action) => async (...given) => {
  try {
    await action(...given);
  } catch (error) {
    say(error.message);
  }
};

// Photos

site.shown = () => {
  $.compare.hidden = !(server.photos && at >= 0);
  if (!$.compare.hidden) $.photo.src = `photo?${query({ camera: at })}`;
  $.photo.hidden = $.compare.hidden || $.split.value === "0";
  for (const option of $.mode.options) option.hidden = option.value === "error" && $.compare.hidden;
  if (look.mode === "error" && $.compare.hidden) $.mode.value = look.mode = "color";
};

$.split.oninput = () => {
  $.photo.hidden = $.split.value === "0";
  $.photo.style.clipPath = `inset(0 ${100 - $.split.value}% 0 0)`;
};

// Cameras of the data set as pyramids: train blue, test orange.

function marks() {
  const pen = $.marks.getContext("2d");
  [$.marks.width, $.marks.height] = sized(1); // which clears it
  if (!$.frames.checked) return;
  const lens = lensAt(camera, ...sized(1)), large = 0.06 * distance;
  scene.cameras.forEach((other, i) => {
    if (i === at) return;
    const [x, y] = [(large * other.width) / other.fx / 2, (large * other.height) / other.fy / 2];
    const corners = [[0, 0, 0], [-x, -y, large], [x, -y, large], [x, y, large], [-x, y, large]].map((c) =>
      onScreen(c.reduce((p, by, k) => plus(p, column(other.turn, k), by), other.place), lens));
    pen.strokeStyle = pen.fillStyle = other.test ? "#fa3" : "#49f";
    pen.beginPath();
    for (const [a, b] of [[0, 1], [0, 2], [0, 3], [0, 4], [1, 2], [2, 3], [3, 4], [4, 1]])
      if (corners[a] && corners[b]) pen.moveTo(...corners[a]), pen.lineTo(...corners[b]);
    pen.stroke();
    if (corners[4] && scene.cameras.length <= 100) pen.fillText(named(other), ...corners[4]);
  });
}

function onScreen(point, [fx, fy, cx, cy]) {
  const away = plus(point, camera.place, -1), [x, y, z] = [0, 1, 2].map((k) => dot(away, column(camera.turn, k)));
  return z > 0.01 * distance ? [(fx * x) / z + cx, (fy * y) / z + cy] : null;
}

function pick(x, y) {
  const lens = lensAt(camera, innerWidth, innerHeight);
  let best = 15, found = -1;
  scene.cameras.forEach((other, i) => {
    const seen = i !== at && onScreen(other.place, lens), away = seen ? Math.hypot(seen[0] - x, seen[1] - y) : Infinity;
    if (away < best) (best = away), (found = i);
  });
  if (found >= 0) show(scene.cameras[found], found);
}

let pressed = null;
$.stage.addEventListener("pointerdown", (event) => (pressed = event));
$.stage.addEventListener("click", ({ clientX: x, clientY: y }) => {
  if ($.frames.checked && Math.hypot(x - pressed.clientX, y - pressed.clientY) < 4) pick(x, y);
});
$.framed.hidden = !scene.cameras.length;
$.frames.onchange = changed;
KEYS.f = () => $.framed.hidden || $.frames.click();

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
  const blend = (name) => Math.exp((1 - s) * Math.log(b[name]) + s * Math.log(c[name]));
  const turn = turnOf([right, cross(forward, right), forward]);
  return { ...b, place: mixed((view) => view.place), turn, fx: blend("fx"), fy: blend("fy") };
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

// Into the model folder; where there is none, as a download.
const save = tried(async () => {
  const text = JSON.stringify(pathFile());
  if (server.saves) return say(await (await asked("path", {}, { method: "POST", body: text })).text());
  const link = Object.assign(document.createElement("a"), { download: "camera_path.json" });
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.click();
  say("camera_path.json: render.py --path draws it");
});

KEYS.k = () => (path.push({ ...camera }), keysShown(path.length - 1));
$.keys.onchange = () => show(path[$.keys.value]);
$.earlier.onclick = () => moveKey(-1);
$.later.onclick = () => moveKey(1);
$.drop.onclick = () => (path.splice($.keys.value, 1), keysShown(+$.keys.value));
$.play.onclick = play;
$.save.onclick = save;

// Which splats, and who draws them

fill($.mode, [...MODES.slice(0, server.splats ? 6 : 4), ...(server.photos ? ["error"] : [])].map((mode) => [mode, mode]));
$.scale.parentElement.hidden = $.degree.parentElement.hidden = !server.splats; // a field of rays has no sizes and SH
fill($.iteration, server.iterations.map((i) => [i, `iteration ${i}`]));
fill($.source, server.sources);

site.load = async () => {
  const exact = +($.source.value === "floats");
  source = exact ? "browser" : $.source.value;
  if (source !== "browser") return;
  try {
    await load(new Uint8Array(await (await asked("splats", { exact })).arrayBuffer()));
  } catch (error) {
    const other = server.sources.map(([name]) => name).find((name) => name === "exact" || name === "training");
    if (splats || !other) throw error;
    $.source.value = source = other; // this browser cannot draw
  }
};
$.source.onchange = $.iteration.onchange = tried(async () => (await site.load(), changed()));

// A file dropped on the page takes the model's place.
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", tried(async (event) => {
  event.preventDefault();
  const file = event.dataTransfer.files[0];
  if (!file || !splats) return;
  await load(new Uint8Array(await file.arrayBuffer()));
  source = "browser";
  changed();
}));

// A run that trains: what it says once a second, its loss and the number of splats as curves, and a button.

const hear = tried(async () => {
  const told = await (await asked("state")).json();
  $.pause.hidden = !told.live;
  if (!told.live) return say("the run has ended; the last picture stays");
  const loss = told.losses?.loss ? `, loss ${told.losses.loss.toFixed(4)}` : "";
  say(`iteration ${told.iteration} of ${told.iterations}, ${(told.gaussians || 0).toLocaleString("en")} splats${loss}`);
  if (!told.paused && $.pause.textContent === "resume") changed();
  $.pause.textContent = told.paused ? "resume" : "pause";
  curve(told.curve);
});

async function watch() {
  await hear();
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

$.pause.onclick = tried(async () => {
  await asked("pause", { on: +($.pause.textContent === "pause") }, { method: "POST" });
  $.pause.textContent = $.pause.textContent === "pause" ? "resume" : "pause";
  changed();
});
if (server.live) watch();
