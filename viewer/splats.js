// Gaussian splats in WebGL2, drawn as the project's rasterizer draws them: the same projection, the same cuts,
// the same order. Nothing here knows about mice, pages or servers.
//
//   const splats = new Splats(canvas);
//   await splats.load(bytes);        // a .ply or .spz file, which may be gzipped
//   await splats.sort(camera, near); // in a worker; the page stays awake
//   splats.draw(camera, look, size); // with the order of the last sort that has ended
//
// A camera is {place, turn, fx, fy, width, height}: `turn` has the rows of the rotation from the camera (x right,
// y down, z forward) to the world; the focal lengths are in pixels of a picture of width x height.

const ROW = 2048; // splats in one row of a texture
const QUADS = 1024; // splats in one instance: few instances, as each costs time of its own
const NEAR = 0.2; // what is closer is not drawn; of training's own unit of length
const PARTS = 8; // of the splats, after each of which pixels that are done are shut

// In the worker: files become textures, and depths an order. It has no access to anything else of this file.
function worker() {
  const ROW = 2048;
  const FLIPS = [1, -1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1]; // of SH when y and z change sign
  const LARGEST = 16384 * ROW;
  let count = 0, means, depths, keys, rows, rows2, low, high;

  onmessage = async ({ data }) => {
    try {
      if (data.file) {
        const model = await decoded(new Uint8Array(data.file));
        postMessage({ ...model, id: data.id }, [...model.geometry, ...model.sh].map((layer) => layer.buffer));
      } else {
        const order = sorted(data.axis, data.near);
        postMessage({ ...order, id: data.id }, [order.order.buffer]);
      }
    } catch (error) {
      postMessage({ error: error.message, id: data.id });
    }
  };

  async function decoded(bytes) {
    if (bytes[0] === 0x1f && bytes[1] === 0x8b) {
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    }
    const magic = String.fromCharCode(...bytes.subarray(0, 4));
    if (magic === "NGSP") return spz(bytes);
    if (magic.startsWith("ply")) return ply(bytes);
    throw new Error("this is neither a .ply nor an .spz file of splats");
  }

  // Room for all, and put(i, ...) to fill it.
  function room(splats, degree, antialiased) {
    if (!(splats >= 1 && splats <= LARGEST)) throw new Error(`the file says that it has ${splats} splats`);
    const texels = Math.ceil(splats / ROW) * ROW;
    const layers = (n) => Array.from({ length: n }, () => new Float32Array(4 * texels));
    const geometry = layers(3), sh = layers(Math.ceil((3 * (degree + 1) ** 2) / 4));
    count = splats;
    means = new Float32Array(3 * splats);
    depths = new Float32Array(splats);
    keys = new Uint32Array(depths.buffer);
    rows = new Uint32Array(texels);
    rows2 = new Uint32Array(splats);
    low = new Uint32Array(65536);
    high = new Uint32Array(65536);
    const put = (i, x, y, z, opacity, sx, sy, sz, w, a, b, c) => {
      const [place, shape, rest] = geometry, at = 4 * i;
      means.set([x, y, z], 3 * i);
      place.set([x, y, z, opacity], at);
      const n = 1 / (Math.hypot(w, a, b, c) || 1);
      w *= n, a *= n, b *= n, c *= n;
      const m = [ // rotation times scale
        sx * (1 - 2 * (b * b + c * c)), sy * 2 * (a * b - w * c), sz * 2 * (a * c + w * b),
        sx * 2 * (a * b + w * c), sy * (1 - 2 * (a * a + c * c)), sz * 2 * (b * c - w * a),
        sx * 2 * (a * c - w * b), sy * 2 * (b * c + w * a), sz * (1 - 2 * (a * a + b * b)),
      ];
      const dot = (r, s) => m[r] * m[s] + m[r + 1] * m[s + 1] + m[r + 2] * m[s + 2];
      shape.set([dot(0, 0), dot(0, 3), dot(0, 6), dot(3, 3)], at);
      rest[at] = dot(3, 6), rest[at + 1] = dot(6, 6);
    };
    const color = (i, k, channel, value) => (sh[(3 * k + channel) >> 2][4 * i + ((3 * k + channel) & 3)] = value);
    return { count, degree, antialiased, geometry, sh, put, color };
  }

  function finished({ put, color, ...model }) {
    const step = Math.ceil(count / 20000), middle = [0, 1, 2].map((axis) => median((i) => means[3 * i + axis], step));
    const away = (i) => Math.hypot(...middle.map((m, axis) => means[3 * i + axis] - m));
    return { ...model, middle, radius: median(away, step) || 1 };
  }

  function median(value, step) {
    const values = new Float32Array(Math.ceil(count / step)).map((_, k) => value(k * step)).sort();
    return values[values.length >> 1];
  }

  function spz(bytes) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
    const version = view.getUint32(4, true), splats = view.getUint32(8, true);
    const [degree, bits, flags] = bytes.subarray(12, 15);
    const each = version === 3 ? 4 : 3, kept = Math.min(degree, 3), rest = (degree + 1) ** 2 - 1;
    if (version < 2 || version > 3) throw new Error(`SPZ of version ${version} cannot be shown, only 2 and 3`);
    if (bytes.length < 16 + splats * (16 + each + 3 * rest)) throw new Error("the file ends too early");
    const model = room(splats, kept, (flags & 1) === 1), grid = 2 ** -bits;
    let at = 16;
    const [place, alpha, tint, size, turn, sh] = [9, 1, 3, 3, each, 3 * rest].map((n) => (at += n * splats) - n * splats);
    const coordinate = (o) => (((bytes[o] << 8) | (bytes[o + 1] << 16) | (bytes[o + 2] << 24)) >> 8) * grid;
    const scale = (o) => Math.exp(bytes[o] / 16 - 10);
    for (let i = 0; i < splats; i++) {
      const o = place + 9 * i, s = size + 3 * i;
      const q = each === 4 ? largest(view.getUint32(turn + 4 * i, true)) : three(turn + 3 * i);
      model.put(i, coordinate(o), -coordinate(o + 3), -coordinate(o + 6), bytes[alpha + i] / 255,
        scale(s), scale(s + 1), scale(s + 2), q[3], q[0], -q[1], -q[2]);
      for (let c = 0; c < 3; c++) {
        model.color(i, 0, c, (bytes[tint + 3 * i + c] / 255 - 0.5) / 0.15);
        for (let k = 1; k < (kept + 1) ** 2; k++)
          model.color(i, k, c, (FLIPS[k] * (bytes[sh + 3 * (rest * i + k - 1) + c] - 128)) / 128);
      }
    }
    return finished(model);

    function three(o) {
      const [x, y, z] = [0, 1, 2].map((k) => bytes[o + k] / 127.5 - 1);
      return [x, y, z, Math.sqrt(Math.max(0, 1 - x * x - y * y - z * z))];
    }
  }

  // A quaternion (x, y, z, w) without its largest component: 2 bits say which that is, then sign and 9 bits each.
  function largest(word) {
    const q = [0, 0, 0, 0], missing = word >>> 30;
    let sum = 0;
    for (let k = 3; k >= 0; k--) {
      if (k === missing) continue;
      q[k] = ((word & 511) * Math.SQRT1_2) / 511;
      sum += q[k] * q[k];
      if (word & 512) q[k] = -q[k];
      word >>>= 10;
    }
    q[missing] = Math.sqrt(Math.max(0, 1 - sum));
    return q;
  }

  function ply(bytes) {
    const text = new TextDecoder().decode(bytes.subarray(0, 20000)), end = text.indexOf("end_header\n");
    const header = text.slice(0, end).split("\n").map((line) => line.trim());
    const number = (start) => Number((header.find((line) => line.startsWith(start)) || "").slice(start.length));
    const floats = header.filter((line) => line.startsWith("property")).map((line) => line.split(" "));
    if (end < 0 || !header.includes("format binary_little_endian 1.0") || !floats.every(([, t]) => t === "float"))
      throw new Error("the .ply file must be binary, little-endian, with float properties");
    const names = floats.map(([, , name]) => name), column = Object.fromEntries(names.map((n, k) => [n, k]));
    const rest = names.filter((name) => name.startsWith("f_rest_")).length / 3, splats = number("element vertex ");
    const degree = [0, 3, 8, 15].indexOf(rest), start = end + "end_header\n".length;
    for (const name of ["x", "y", "z", "opacity", "scale_0", "scale_1", "scale_2", "rot_0", "f_dc_0"])
      if (!(name in column)) throw new Error(`the .ply file has no property ${name}: it holds no splats`);
    if (degree < 0) throw new Error(`the .ply file must have 0, 9, 24 or 45 properties f_rest_i, not ${3 * rest}`);
    if (bytes.length < start + 4 * names.length * splats) throw new Error("the file ends too early");
    const model = room(splats, degree, header.some((line) => /^comment (SplatRenderMode: mip|antialiased 1)$/.test(line)));
    const colors = [0, 1, 2].map((c) => [`f_dc_${c}`, ...Array(rest).keys()].map((k) => column[k] ?? column[`f_rest_${c * rest + k}`]));
    const data = new Float32Array(bytes.slice(start, start + 4 * names.length * splats).buffer);
    for (let i = 0; i < splats; i++) {
      const of = (name) => data[i * names.length + column[name]];
      model.put(i, of("x"), of("y"), of("z"), 1 / (1 + Math.exp(-of("opacity"))),
        Math.exp(of("scale_0")), Math.exp(of("scale_1")), Math.exp(of("scale_2")),
        of("rot_0"), of("rot_1"), of("rot_2"), of("rot_3"));
      for (let c = 0; c < 3; c++) {
        for (let k = 0; k <= rest; k++) model.color(i, k, c, data[i * names.length + colors[c][k]]);
      }
    }
    return finished(model);
  }

  // Numbers of the splats in front of the camera, the farthest first. Two passes of 16 bits over the bits of the
  // depths, which as positive floats are in the order of the numbers: exact, and 10 ms for 300,000.
  function sorted([a, b, c, d], near) {
    const begun = performance.now();
    low.fill(0), high.fill(0);
    let shown = 0;
    for (let i = 0; i < count; i++) {
      const depth = (depths[i] = a * means[3 * i] + b * means[3 * i + 1] + c * means[3 * i + 2] + d);
      if (!(depth > near)) continue;
      rows2[shown++] = i;
      low[keys[i] & 65535]++, high[keys[i] >>> 16]++;
    }
    for (const sums of [low, high])
      for (let k = 65535, sum = 0, more; k >= 0; k--) more = sums[k], sums[k] = sum, sum += more;
    for (let r = shown - 1; r >= 0; r--) rows[low[keys[rows2[r]] & 65535]++] = rows2[r];
    for (let r = 0; r < shown; r++) rows2[high[keys[rows[r]] >>> 16]++] = rows[r];
    const order = new Uint32Array(rows.length);
    order.set(rows2.subarray(0, shown));
    const part = (share) => depths[rows2[Math.floor(share * (shown - 1))]];
    const range = shown ? [part(0.98), part(0.02)] : [1, 2];
    return { order, shown, range, ms: performance.now() - begun };
  }
}

const COMMON = `#version 300 es
precision highp float; precision highp int; precision highp sampler2DArray; precision highp usampler2D;
`;

const WHOLE = `${COMMON}
void main() { gl_Position = vec4(vec2(gl_VertexID == 1 ? 3 : -1, gl_VertexID == 2 ? 3 : -1), -1, 1); }`;

// One fragment is one splat: what of it the picture needs, once and not at each of its corners.
const PROJECT = `${COMMON}
uniform sampler2DArray geometry, sh;
uniform mat4 view; uniform vec3 eye; uniform vec4 lens; uniform vec2 size;
uniform int count, degree, mode; uniform float scale, near; uniform bool antialiased;
layout(location = 0) out uvec4 place; // mean x and y; half of the longer axis, or first and last + 1 of columns and rows
layout(location = 1) out uvec4 shape; // of the exponent of 2: dx dx, dx dy, dy dy; log2 of the opacity
layout(location = 2) out uvec4 look; // color; the shorter axis in parts of the longer, -1 for an upright box, 0 if there is nothing
int layer = -1; vec4 kept;
float number(int j) {
  if (j >> 2 != layer) { layer = j >> 2; kept = texelFetch(sh, ivec3(gl_FragCoord.xy, layer), 0); }
  return kept[j & 3];
}
vec3 sh_at(int k) { float r = number(3 * k), g = number(3 * k + 1); return vec3(r, g, number(3 * k + 2)); }
vec3 color(vec3 d) {
  float x = d.x, y = d.y, z = d.z, xx = x * x, yy = y * y, zz = z * z;
  vec3 c = 0.28209479177387814 * sh_at(0) + 0.5;
  if (degree > 0) c += 0.4886025119029199 * (-y * sh_at(1) + z * sh_at(2) - x * sh_at(3));
  if (degree > 1)
    c += 1.0925484305920792 * (x * y * sh_at(4) - y * z * sh_at(5)) + 0.31539156525252005 * (2. * zz - xx - yy) * sh_at(6)
      - 1.0925484305920792 * x * z * sh_at(7) + 0.5462742152960396 * (xx - yy) * sh_at(8);
  if (degree > 2)
    c += -0.5900435899266435 * y * (3. * xx - yy) * sh_at(9) + 2.890611442640554 * x * y * z * sh_at(10)
      - 0.4570457994644658 * y * (4. * zz - xx - yy) * sh_at(11)
      + 0.3731763325901154 * z * (2. * zz - 3. * xx - 3. * yy) * sh_at(12)
      - 0.4570457994644658 * x * (4. * zz - xx - yy) * sh_at(13) + 1.445305721320277 * z * (xx - yy) * sh_at(14)
      - 0.5900435899266435 * x * (xx - 3. * yy) * sh_at(15);
  return max(c, 0.);
}
void main() {
  place = shape = look = uvec4(0);
  ivec2 at = ivec2(gl_FragCoord.xy);
  if (at.y * ${ROW} + at.x >= count) return;
  vec4 a = texelFetch(geometry, ivec3(at, 0), 0);
  vec3 p = (view * vec4(a.xyz, 1)).xyz;
  if (!(p.z > near)) return;
  vec4 b = scale * scale * texelFetch(geometry, ivec3(at, 1), 0);
  vec2 c = scale * scale * texelFetch(geometry, ivec3(at, 2), 0).xy;
  mat3 sigma = mat3(b.x, b.y, b.z, b.y, b.w, c.x, b.z, c.x, c.y), turn = transpose(mat3(view));
  vec2 limit = 1.3 * size / (2. * lens.xy), t = clamp(p.xy / p.z, -limit, limit);
  vec3 u = lens.x / p.z * (turn[0] - t.x * turn[2]), v = lens.y / p.z * (turn[1] - t.y * turn[2]);
  vec3 thin = vec3(dot(u, sigma * u), dot(u, sigma * v), dot(v, sigma * v));
  vec3 wide = thin + vec3(0.3, 0, 0.3);
  float opacity = a.w, det = wide.x * wide.z - wide.y * wide.y;
  if (antialiased) opacity *= sqrt(max(2.5e-5, (thin.x * thin.z - thin.y * thin.y) / det));
  float reach = log(255. * opacity);
  if (!(reach > 0.) || !(det > 0.)) return;
  if (mode == 4) { wide = vec3(2.25, 0, 2.25); det = 2.25 * 2.25; }
  if (mode >= 4) reach = 0.5;
  // The rectangle of tiles of 16 x 16 pixels around three standard deviations, and within it where alpha counts.
  float mid = 0.5 * (wide.x + wide.z), radius = ceil(3. * sqrt(mid + sqrt(max(0.1, mid * mid - det))));
  vec2 mean = lens.xy * p.xy / p.z + lens.zw, extent = sqrt(2. * reach * wide.xz);
  vec2 first = 16. * floor((mean - 0.5 - radius) / 16.), last = 16. * floor((mean + radius + 14.5) / 16.);
  bool whole = all(lessThanEqual(first, mean - extent)) && all(greaterThanEqual(last, mean + extent));
  first = clamp(max(first, floor(mean - extent)), vec2(0), size);
  last = clamp(min(last, ceil(mean + extent)), vec2(0), size);
  if (any(lessThanEqual(last, first))) return;
  // Drawn as that box, or as a turned one around the ellipse if it is smaller and no tile ends within.
  float half_gap = sqrt(max(0., mid * mid - det)), longer = mid + half_gap, more = 0.5 * (wide.x - wide.z);
  vec2 axis = normalize(more > 0. ? vec2(more + half_gap, wide.y) : vec2(wide.y, half_gap - more) + vec2(0, 1e-9));
  float along = 1.01 * sqrt(2. * reach * longer) + 0.5, across = 1.01 * sqrt(2. * reach * det / longer) + 0.5;
  bool turned = whole && 4. * along * across < (last.x - first.x) * (last.y - first.y);
  uvec4 box = uvec4(first, last);
  place = uvec4(floatBitsToUint(mean), turned ? floatBitsToUint(along * axis) : uvec2(box.x | box.z << 16, box.y | box.w << 16));
  shape = floatBitsToUint(vec4(0.7213475204 * vec3(wide.z, -2. * wide.y, wide.x) / det, log2(opacity)));
  look = floatBitsToUint(vec4(mode == 1 || mode == 3 ? vec3(1. / p.z) : color(normalize(a.xyz - eye)), turned ? across / along : -1.));
}`;

const QUAD = `${COMMON}
uniform usampler2D order, places, shapes, looks; uniform vec2 size; uniform int first, shown; uniform bool front;
flat out vec2 mean; flat out vec4 shape; flat out vec3 look;
void main() {
  int at = first + gl_InstanceID * ${QUADS} + (gl_VertexID >> 2);
  gl_Position = vec4(2, 2, 2, 1);
  if (at >= shown) return;
  if (front) at = shown - 1 - at;
  uint splat = texelFetch(order, ivec2(at % ${ROW}, at / ${ROW}), 0).r;
  ivec2 texel = ivec2(splat % ${ROW}u, splat / ${ROW}u);
  uvec4 place = texelFetch(places, texel, 0);
  vec4 found = uintBitsToFloat(texelFetch(looks, texel, 0));
  if (found.w == 0.) return;
  mean = uintBitsToFloat(place.xy);
  shape = uintBitsToFloat(texelFetch(shapes, texel, 0));
  look = found.rgb;
  bvec2 side = equal(ivec2(gl_VertexID) & ivec2(1, 2), ivec2(0));
  vec2 u = uintBitsToFloat(place.zw), by = mix(vec2(1), vec2(-1), side);
  vec2 corner = found.w > 0. ? mean + by.x * u + by.y * found.w * vec2(-u.y, u.x) : mix(vec2(place.zw >> 16), vec2(place.zw & 65535u), side);
  gl_Position = vec4(2. * corner / size - 1., 0, 1);
}`;

const BLEND = `${COMMON}
flat in vec2 mean; flat in vec4 shape; flat in vec3 look; out vec4 pixel;
void main() {
  vec2 d = gl_FragCoord.xy - mean; // rows go down the picture
  float e = shape.w - (shape.x * d.x + shape.y * d.y) * d.x - shape.z * d.y * d.y;
  if (e < -7.994353) discard; // 1/255
  float alpha = min(0.99, exp2(e));
  pixel = vec4(look * alpha, alpha);
}`;

// Centers and ellipsoids: solid, as far as one standard deviation.
const SOLID = `${COMMON}
uniform int mode; flat in vec2 mean; flat in vec4 shape; flat in vec3 look; out vec4 pixel;
void main() {
  vec2 d = gl_FragCoord.xy - mean;
  float e = (shape.x * d.x + shape.y * d.y) * d.x + shape.z * d.y * d.y;
  if (e > 0.7213475) discard;
  pixel = vec4(mode == 5 ? look * (1.1 - 0.6 * e * e) : look, 1);
}`;

// Shuts the pixels that no more light comes through: they are nearer than any splat from now on.
const SHUT = `${COMMON}
uniform sampler2D picture;
void main() { if (texelFetch(picture, ivec2(gl_FragCoord.xy), 0).a >= 1e-4) discard; }`;

const FINISH = `${COMMON}
uniform sampler2D picture; uniform vec3 background; uniform vec2 size, range; uniform vec4 lens; uniform int mode;
uniform bool front;
out vec4 pixel;
vec4 read(vec4 c) { return vec4(c.rgb, front ? 1. - c.a : c.a); } // what passes, or what does not
vec3 scale(float t) { return clamp(1.5 - abs(4. * t - vec3(3, 2, 1)), 0., 1.); } // blue, green, red
vec3 point(ivec2 at) {
  vec4 seen = read(texelFetch(picture, clamp(at, ivec2(0), textureSize(picture, 0) - 1), 0));
  return vec3((vec2(at) + 0.5 - lens.zw) / lens.xy, 1) * seen.a / max(seen.r, 1e-9);
}
void main() {
  vec2 at = vec2(gl_FragCoord.x, size.y - gl_FragCoord.y) / size;
  vec4 seen = read(texture(picture, at));
  vec3 shown = seen.rgb;
  if (mode == 1) shown = seen.a * scale(clamp((seen.r / max(seen.a, 1e-6) - range.x) / (range.y - range.x), 0., 1.));
  if (mode == 3) {
    ivec2 i = ivec2(at * vec2(textureSize(picture, 0)));
    vec3 n = cross(point(i + ivec2(0, 1)) - point(i - ivec2(0, 1)), point(i + ivec2(1, 0)) - point(i - ivec2(1, 0)));
    shown = seen.a * (0.5 + 0.5 * vec3(1, -1, -1) * normalize(n + vec3(0, 0, -1e-20)));
  }
  pixel = vec4(mode == 2 ? vec3(seen.a) : shown + (1. - seen.a) * background, 1);
}`;

const MODES = ["color", "depth", "alpha", "normals", "centers", "ellipsoids"];

class Splats {
  constructor(canvas, { floats = true } = {}) {
    const gl = (this.gl = canvas.getContext("webgl2", { alpha: false, antialias: false, preserveDrawingBuffer: true }));
    if (!gl) throw new Error("this browser has no WebGL2");
    this.canvas = canvas;
    const half = floats && (gl.getExtension("EXT_color_buffer_float") || gl.getExtension("EXT_color_buffer_half_float"));
    this.front = !!(half && gl.getExtension("EXT_color_buffer_float") && gl.getExtension("EXT_float_blend"));
    this.format = this.front ? gl.RGBA32F : half ? gl.RGBA16F : gl.RGBA8;
    this.programs = {
      project: this.program(WHOLE, PROJECT), blend: this.program(QUAD, BLEND), solid: this.program(QUAD, SOLID),
      shut: this.program(WHOLE, SHUT), finish: this.program(WHOLE, FINISH),
    };
    const indices = new Uint16Array(6 * QUADS).map((_, k) => 4 * Math.floor(k / 6) + [0, 1, 2, 2, 1, 3][k % 6]);
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, indices, gl.STATIC_DRAW);
    gl.disable(gl.DITHER);
    this.textures = [];
    this.count = this.shown = 0;
    this.target = { width: 0, height: 0 };
    const url = URL.createObjectURL(new Blob([`(${worker})()`], { type: "text/javascript" }));
    this.worker = new Worker(url);
    this.worker.onmessage = ({ data }) => this.answered(data);
    this.waiting = new Map();
    this.asked = 0;
  }

  ask(message, transfer = []) {
    const id = this.asked++;
    this.worker.postMessage({ ...message, id }, transfer);
    return new Promise((resolve, reject) => this.waiting.set(id, { resolve, reject }));
  }

  answered({ id, error, ...answer }) {
    const { resolve, reject } = this.waiting.get(id);
    this.waiting.delete(id);
    if (error) reject(new Error(error));
    else resolve(answer);
  }

  async load(bytes) {
    const model = await this.ask({ file: bytes.buffer }, [bytes.buffer]), gl = this.gl;
    const rows = Math.ceil(model.count / ROW);
    if (rows > gl.getParameter(gl.MAX_TEXTURE_SIZE)) throw new Error(`${model.count} splats are too many for this browser`);
    for (const texture of this.textures) gl.deleteTexture(texture);
    this.textures = [];
    this.geometry = this.layers(model.geometry, rows, gl.RGBA32F);
    this.sh = this.layers(model.sh, rows, gl.RGBA16F);
    this.order = this.texture(ROW, rows, gl.R32UI);
    this.projected = [0, 1, 2].map(() => this.texture(ROW, rows, gl.RGBA32UI));
    this.projection = this.framebuffer(this.projected);
    Object.assign(this, { count: model.count, degree: model.degree, middle: model.middle, radius: model.radius });
    this.antialiased = model.antialiased;
    this.rows = rows;
    this.shown = 0;
    this.check();
  }

  async sort(camera, near = NEAR) {
    const { turn: r, place: p } = camera;
    const axis = [r[2], r[5], r[8], -(r[2] * p[0] + r[5] * p[1] + r[8] * p[2])];
    const { order, shown, range, ms } = await this.ask({ axis, near });
    const gl = this.gl;
    gl.bindTexture(gl.TEXTURE_2D, this.order);
    gl.texSubImage2D(gl.TEXTURE_2D, 0, 0, 0, ROW, this.rows, gl.RED_INTEGER, gl.UNSIGNED_INT, order);
    Object.assign(this, { shown, range, ms });
  }

  // look: {mode, scale, degree, background, near, antialiased}; size: [width, height] of the picture before it is
  // stretched over the canvas.
  draw(camera, look, [width, height]) {
    const gl = this.gl, front = ["1i", +this.front], mode = MODES.indexOf(look.mode);
    if (width !== this.target.width || height !== this.target.height) this.resize(width, height);
    const lens = lensAt(camera, width, height), common = { size: ["2f", width, height], mode: ["1i", mode] };
    gl.disable(gl.BLEND);
    this.pass("project", this.projection, ROW, this.rows, {
      ...common, lens: ["4f", ...lens], view: worldToCamera(camera), eye: ["3f", ...camera.place],
      count: ["1i", this.count], degree: ["1i", Math.min(look.degree, this.degree)], scale: ["1f", look.scale], near: ["1f", look.near ?? NEAR],
      antialiased: ["1i", look.antialiased ?? this.antialiased],
    }, { geometry: this.geometry, sh: this.sh });
    gl.drawArrays(gl.TRIANGLES, 0, 3);

    this.blend(common, mode >= 4);
    const [near, far] = this.range || [1, 2];
    this.pass("finish", null, this.canvas.width, this.canvas.height, {
      size: ["2f", this.canvas.width, this.canvas.height], lens: ["4f", ...lens], mode: ["1i", mode],
      front, background: ["3f", ...look.background], range: ["2f", 1 / far / 1.02, 1.02 / near], // a wall that faces us has a range, too
    }, { picture: this.target.texture });
    gl.drawArrays(gl.TRIANGLES, 0, 3);
    this.check();
  }

  // With 32-bit floats the nearest first, the alpha channel being the light that passes: pixels where none does are
  // shut and cost nothing more. With less, the farthest first, where rounding does the least harm.
  blend(common, solid) {
    const gl = this.gl, { width, height, framebuffer, texture, shutter } = this.target;
    const [places, shapes, looks] = this.projected, instances = Math.ceil(this.shown / QUADS);
    const step = this.front ? Math.max(1, Math.ceil(instances / PARTS)) : Math.max(1, instances);
    gl.bindFramebuffer(gl.FRAMEBUFFER, framebuffer);
    gl.clearColor(0, 0, 0, +this.front);
    gl.depthMask(true);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    if (this.front) gl.enable(gl.DEPTH_TEST);
    for (let first = 0; first < instances; first += step) {
      if (first) {
        gl.depthMask(true);
        this.pass("shut", shutter, width, height, {}, { picture: texture });
        gl.drawArrays(gl.TRIANGLES, 0, 3);
      }
      this.pass(solid ? "solid" : "blend", framebuffer, width, height,
        { ...common, first: ["1i", first * QUADS], shown: ["1i", this.shown], front: ["1i", +this.front] },
        { order: this.order, places, shapes, looks });
      gl.depthMask(false);
      gl.enable(gl.BLEND);
      if (this.front) gl.blendFuncSeparate(gl.DST_ALPHA, gl.ONE, gl.ZERO, gl.ONE_MINUS_SRC_ALPHA);
      else gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
      const count = Math.min(step, instances - first);
      gl.drawElementsInstanced(gl.TRIANGLES, 6 * QUADS, gl.UNSIGNED_SHORT, 0, count);
      gl.disable(gl.BLEND);
    }
    gl.disable(gl.DEPTH_TEST);
  }

  // When the picture is there; until then the page stays awake.
  async finished() {
    const gl = this.gl, fence = gl.fenceSync(gl.SYNC_GPU_COMMANDS_COMPLETE, 0);
    gl.flush();
    while (gl.clientWaitSync(fence, 0, 0) === gl.TIMEOUT_EXPIRED) await new Promise((next) => setTimeout(next, 4));
    gl.deleteSync(fence);
  }

  pass(name, framebuffer, width, height, uniforms, textures) {
    const gl = this.gl, program = this.programs[name];
    gl.bindFramebuffer(gl.FRAMEBUFFER, framebuffer);
    gl.viewport(0, 0, width, height);
    gl.useProgram(program);
    for (const [key, [kind, ...values]] of Object.entries(uniforms)) {
      const where = gl.getUniformLocation(program, key);
      if (kind === "mat4") gl.uniformMatrix4fv(where, true, values);
      else gl["uniform" + kind](where, ...values);
    }
    Object.entries(textures).forEach(([key, texture], unit) => {
      gl.activeTexture(gl.TEXTURE0 + unit);
      gl.bindTexture(texture.layered ? gl.TEXTURE_2D_ARRAY : gl.TEXTURE_2D, texture);
      gl.uniform1i(gl.getUniformLocation(program, key), unit);
    });
    gl.activeTexture(gl.TEXTURE0);
  }

  resize(width, height) {
    const gl = this.gl;
    const { texture: old, depth: oldDepth, framebuffer, shutter } = this.target;
    gl.deleteTexture(old), gl.deleteRenderbuffer(oldDepth), gl.deleteFramebuffer(framebuffer), gl.deleteFramebuffer(shutter);
    const texture = this.texture(width, height, this.format);
    this.textures.pop();
    const filter = this.front && !gl.getExtension("OES_texture_float_linear") ? gl.NEAREST : gl.LINEAR;
    for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, side, filter);
    for (const side of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T]) gl.texParameteri(gl.TEXTURE_2D, side, gl.CLAMP_TO_EDGE);
    const depth = gl.createRenderbuffer();
    gl.bindRenderbuffer(gl.RENDERBUFFER, depth);
    gl.renderbufferStorage(gl.RENDERBUFFER, gl.DEPTH_COMPONENT16, width, height);
    this.target = { width, height, texture, depth,
      framebuffer: this.framebuffer([texture], depth), shutter: this.framebuffer([], depth) };
  }

  texture(width, height, format, depth = 0) {
    const gl = this.gl, texture = gl.createTexture(), kind = depth ? gl.TEXTURE_2D_ARRAY : gl.TEXTURE_2D;
    texture.layered = depth > 0;
    this.textures.push(texture);
    gl.bindTexture(kind, texture);
    if (depth) gl.texStorage3D(kind, 1, format, width, height, depth);
    else gl.texStorage2D(kind, 1, format, width, height);
    for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(kind, side, gl.NEAREST);
    return texture;
  }

  layers(arrays, rows, format) {
    const gl = this.gl, texture = this.texture(ROW, rows, format, arrays.length);
    arrays.forEach((layer, z) =>
      gl.texSubImage3D(gl.TEXTURE_2D_ARRAY, 0, 0, 0, z, ROW, rows, 1, gl.RGBA, gl.FLOAT, layer));
    return texture;
  }

  framebuffer(textures, depth) {
    const gl = this.gl, framebuffer = gl.createFramebuffer(), places = textures.map((_, k) => gl.COLOR_ATTACHMENT0 + k);
    gl.bindFramebuffer(gl.FRAMEBUFFER, framebuffer);
    textures.forEach((texture, k) => gl.framebufferTexture2D(gl.FRAMEBUFFER, places[k], gl.TEXTURE_2D, texture, 0));
    if (depth) gl.framebufferRenderbuffer(gl.FRAMEBUFFER, gl.DEPTH_ATTACHMENT, gl.RENDERBUFFER, depth);
    gl.drawBuffers(places.length ? places : [gl.NONE]);
    if (gl.checkFramebufferStatus(gl.FRAMEBUFFER) !== gl.FRAMEBUFFER_COMPLETE) throw new Error("WebGL2 gives no frame buffer");
    return framebuffer;
  }

  program(vertex, fragment) {
    const gl = this.gl, program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source), gl.compileShader(shader), gl.attachShader(program, shader);
      if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
    return program;
  }

  check() {
    const error = this.gl.getError();
    if (error) throw new Error(`WebGL2 error 0x${error.toString(16)}`);
  }
}

// fx, fy, cx, cy at this size: all of the camera's own picture is in it.
function lensAt({ fx, fy, width, height }, w, h) {
  const fit = Math.min(w / width, h / height);
  return [fx * fit, fy * fit, w / 2, h / 2];
}

function worldToCamera({ turn: r, place: p }) {
  const row = (k) => [r[k], r[3 + k], r[6 + k], -(r[k] * p[0] + r[3 + k] * p[1] + r[6 + k] * p[2])];
  return ["mat4", ...row(0), ...row(1), ...row(2), 0, 0, 0, 1];
}
