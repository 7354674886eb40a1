// Gaussian splats in WebGL2, drawn as the project's rasterizer draws them: the same projection, the same cuts,
// the same order. Nothing here knows about mice, pages or servers.
//
//   const splats = new Splats(canvas);
//   await splats.load(bytes);        // a file that one of READERS knows, which may be gzipped
//   await splats.sort(camera, near); // in a worker; the page stays awake
//   splats.draw(camera, look, size); // with the order of the last sort that has ended
//
// A camera is {place, turn, fx, fy, width, height}: `turn` has the rows of the rotation from the camera (x right,
// y down, z forward) to the world; the focal lengths are in pixels of a picture of width x height.

const ROW = 2048; // splats in one row of a texture
const NEAR = 0.2; // what is closer is not drawn; of training's own unit of length
const PARTS = 8; // of the splats, after each of which pixels that are done are shut
const MODES = ["color", "depth", "alpha", "normals", "centers", "ellipsoids"];
const TEXTURES = ["geometry", "sh", "order", "projected", "picture", "depth"]; // each stays at the unit of its number

// Readers of files by how these begin. Each runs in the worker, and fills the room that it asks for.
const READERS = { NGS: spz };

// SPZ of version 3: all positions, then all opacities, colors, sizes, turns and SH. Its y and z point the other way.
function spz(bytes, room) {
  const FLIPS = [1, -1, -1, 1, -1, 1, 1, -1, 1, -1, 1, -1, -1, 1, -1, 1]; // of SH when y and z change sign
  const view = new DataView(bytes.buffer), version = view.getUint32(4, true), count = view.getUint32(8, true);
  const [degree, bits, flags] = bytes.subarray(12, 15), rest = 3 * ((degree + 1) ** 2 - 1);
  if (version !== 3) throw new Error(`SPZ of version ${version} cannot be shown, only 3`);
  if (bytes.length < 16 + count * (20 + rest)) throw new Error("the file ends too early");
  const put = room(count, Math.min(degree, 3), flags & 1);
  const coordinate = (at) => (view.getInt32(at - 1, true) >> 8) / 2 ** bits; // 24 bits
  const three = (at, value) => [value(bytes[at]), value(bytes[at + 1]), value(bytes[at + 2])];
  for (let i = 0; i < count; i++) {
    const place = 16 + 9 * i, color = 16 + 10 * count + 3 * i, sh = 13 + 20 * count + rest * i;
    put(i, [coordinate(place), -coordinate(place + 3), -coordinate(place + 6), bytes[16 + 9 * count + i] / 255],
      three(color + 3 * count, (v) => Math.exp(v / 16 - 10)), turn(view.getUint32(16 + 16 * count + 4 * i, true)),
      (k) => k ? three(sh + 3 * k, (v) => (FLIPS[k] * (v - 128)) / 128) : three(color, (v) => (v / 255 - 0.5) / 0.15));
  }

  // A quaternion (x, y, z, w) without its largest component: 2 bits say which that is, then sign and 9 bits each.
  function turn(word) {
    const q = [0, 0, 0, 0], missing = word >>> 30;
    for (let k = 3; k >= 0; k--) {
      if (k === missing) continue;
      q[k] = ((word & 512 ? -1 : 1) * (word & 511) * Math.SQRT1_2) / 511;
      word >>>= 10;
    }
    q[missing] = Math.sqrt(Math.max(0, 1 - Math.hypot(...q) ** 2));
    return [q[0], -q[1], -q[2], q[3]];
  }
}

// In the worker: files become textures, and depths an order. It has no access to anything else of this file.
function worker(readers, ROW) {
  let means = []; // x, y, z and opacity of each splat
  let count = 0;

  onmessage = async ({ data: { file, camera, near } }) => {
    try {
      if (camera) return postMessage(sorted(camera, near));
      const model = await decoded(new Uint8Array(file));
      means = model.geometry.slice(0, model.geometry.length / 3), count = model.count;
      postMessage(model, [model.geometry.buffer, model.sh.buffer]);
    } catch (error) {
      postMessage({ error: error.message });
    }
  };

  async function decoded(bytes) {
    if (bytes[0] === 0x1f && bytes[1] === 0x8b) {
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      bytes = new Uint8Array(await new Response(stream).arrayBuffer());
    }
    const read = readers[String.fromCharCode(...bytes.subarray(0, 3))], model = {};
    if (!read) throw new Error("this is neither a .ply nor an .spz file of splats");
    read(bytes, (count, degree, antialiased) => {
      if (!(count > 0)) throw new Error("the file has no splats");
      const texels = Math.ceil(count / ROW) * ROW, coefficients = (degree + 1) ** 2; // layer after layer
      const geometry = new Float32Array(12 * texels), sh = new Float32Array(3 * coefficients * texels);
      Object.assign(model, { count, degree, antialiased, geometry, sh });
      // turn: a quaternion (x, y, z, w); color(k): red, green and blue of coefficient k
      return (i, place, sizes, turn, color) => {
        const length = Math.hypot(...turn) || 1;
        [place, sizes, turn.map((v) => v / length)].forEach((four, k) => geometry.set(four, 4 * (k * texels + i)));
        for (let k = 0; k < coefficients; k++) sh.set(color(k), 3 * (k * texels + i));
      };
    });
    return model;
  }

  // Numbers of the splats in front of the camera, the nearest first. Two passes of 16 bits over the bits of the
  // depths, which as positive floats are in the order of the numbers: exact.
  function sorted({ place: [x, y, z], turn: [, , a, , , b, , , c] }, near) {
    const begun = performance.now(), depths = new Float32Array(count), keys = new Uint32Array(depths.buffer);
    const lists = [0, 1].map(() => new Uint32Array(means.length / 4)), starts = new Uint32Array(65537);
    let shown = 0;
    for (let i = 0; i < count; i++) {
      depths[i] = a * (means[4 * i] - x) + b * (means[4 * i + 1] - y) + c * (means[4 * i + 2] - z);
      if (depths[i] > near) lists[0][shown++] = i;
    }
    for (const shift of [0, 16]) {
      const [from, to] = lists;
      starts.fill(0);
      for (let r = 0; r < shown; r++) starts[((keys[from[r]] >>> shift) & 65535) + 1]++;
      for (let k = 0; k < 65536; k++) starts[k + 1] += starts[k];
      for (let r = 0; r < shown; r++) to[starts[(keys[from[r]] >>> shift) & 65535]++] = from[r];
      lists.reverse();
    }
    const part = (share) => depths[lists[0][Math.floor(share * (shown - 1))]];
    return { order: lists[0], shown, range: shown ? [part(0.02), part(0.98)] : [1, 2], ms: performance.now() - begun };
  }
}

const COMMON = `#version 300 es
precision highp float; precision highp int; precision highp sampler2DArray; precision highp usampler2DArray;
uniform sampler2DArray geometry, sh, picture; uniform usampler2DArray order, projected;
uniform mat3 turn; uniform vec3 eye, background; uniform vec4 lens; uniform vec2 size, range;
uniform int degree, mode, shown; uniform float scale, near; uniform bool antialiased, front;
ivec3 texel(int i, int layer) { return ivec3(i % ${ROW}, i / ${ROW}, layer); }
`;

const WHOLE = `${COMMON}
void main() { gl_Position = vec4(vec2(gl_VertexID == 1 ? 3 : -1, gl_VertexID == 2 ? 3 : -1), -1, 1); }`;

// One fragment is one splat, in the order in which they are drawn: what of it the picture needs, once and not at
// each of its corners.
const PROJECT = `${COMMON}
#define SH(k) texelFetch(sh, ivec3(at.xy, k), 0).rgb
layout(location = 0) out uvec4 place; // mean x and y; half of the longer axis, or columns and rows: first, last + 1
layout(location = 1) out uvec4 shape; // of the exponent of 2: dx dx, dx dy, dy dy; log2 of the opacity
layout(location = 2) out uvec4 look; // color; shorter axis by longer, -1 for an upright box, 0 if there is nothing
vec3 color(int splat, vec3 d) {
  ivec3 at = texel(splat, 0);
  float x = d.x, y = d.y, z = d.z, xx = x * x, yy = y * y, zz = z * z;
  vec3 c = 0.28209479 * SH(0) + 0.5;
  if (degree > 0) c += 0.48860251 * (-y * SH(1) + z * SH(2) - x * SH(3));
  if (degree > 1)
    c += 1.0925484 * (x * y * SH(4) - y * z * SH(5)) + 0.31539157 * (2. * zz - xx - yy) * SH(6)
      - 1.0925484 * x * z * SH(7) + 0.54627422 * (xx - yy) * SH(8);
  if (degree > 2)
    c += -0.59004359 * y * (3. * xx - yy) * SH(9) + 2.8906114 * x * y * z * SH(10)
      - 0.4570458 * y * (4. * zz - xx - yy) * SH(11)
      + 0.37317633 * z * (2. * zz - 3. * xx - 3. * yy) * SH(12)
      - 0.4570458 * x * (4. * zz - xx - yy) * SH(13) + 1.4453057 * z * (xx - yy) * SH(14)
      - 0.59004359 * x * (xx - 3. * yy) * SH(15);
  return max(c, 0.);
}
// A direction in the axes of a splat, times their lengths.
vec3 own(vec3 v, vec4 q, vec3 lengths) {
  vec3 c = cross(q.xyz, v);
  return lengths * (v + 2. * (cross(q.xyz, c) - q.w * c));
}
void main() {
  place = shape = look = uvec4(0);
  int at = int(gl_FragCoord.y) * ${ROW} + int(gl_FragCoord.x);
  if (at >= shown) return;
  int splat = int(texelFetch(order, texel(front ? at : shown - 1 - at, 0), 0).r);
  vec4 a = texelFetch(geometry, texel(splat, 0), 0), q = texelFetch(geometry, texel(splat, 2), 0);
  vec3 away = a.xyz - eye, p = turn * away, lengths = scale * texelFetch(geometry, texel(splat, 1), 0).xyz;
  if (!(p.z > near)) return;
  vec2 limit = 1.3 * size / (2. * lens.xy), t = clamp(p.xy / p.z, -limit, limit), mean = lens.xy * p.xy / p.z + lens.zw;
  vec3 u = lens.x / p.z * own(vec3(1, 0, -t.x) * turn, q, lengths);
  vec3 v = lens.y / p.z * own(vec3(0, 1, -t.y) * turn, q, lengths);
  vec3 thin = vec3(dot(u, u), dot(u, v), dot(v, v)), wide = thin + vec3(0.3, 0, 0.3);
  float opacity = a.w, det = wide.x * wide.z - wide.y * wide.y;
  if (antialiased) opacity *= sqrt(max(2.5e-5, (thin.x * thin.z - thin.y * thin.y) / det));
  float reach = log(255. * opacity);
  if (!(reach > 0.) || !(det > 0.)) return;
  if (mode == 4) { wide = vec3(2.25, 0, 2.25); det = 2.25 * 2.25; }
  if (mode >= 4) reach = 0.5;
  // The rectangle of tiles of 16 x 16 pixels around three standard deviations, and within it where alpha counts.
  float mid = 0.5 * (wide.x + wide.z), gap = sqrt(max(0., mid * mid - det)), longer = mid + gap;
  float radius = ceil(3. * sqrt(mid + max(sqrt(0.1), gap)));
  vec2 extent = sqrt(2. * reach * wide.xz);
  vec2 low = 16. * floor((mean - 0.5 - radius) / 16.), high = 16. * floor((mean + radius + 14.5) / 16.);
  bool whole = all(lessThanEqual(low, mean - extent)) && all(greaterThanEqual(high, mean + extent));
  low = clamp(max(low, floor(mean - extent)), vec2(0), size);
  high = clamp(min(high, ceil(mean + extent)), vec2(0), size);
  if (any(lessThanEqual(high, low))) return;
  // Drawn as that box, or as a turned one around the ellipse if it is smaller and no tile ends within.
  float more = 0.5 * (wide.x - wide.z);
  vec2 axis = normalize(more > 0. ? vec2(more + gap, wide.y) : vec2(wide.y, gap - more) + vec2(0, 1e-9));
  vec2 box = high - low, around = 1.01 * sqrt(2. * reach * vec2(longer, det / longer)) + 0.5;
  bool turned = whole && 4. * around.x * around.y < box.x * box.y;
  place = uvec4(floatBitsToUint(mean), turned ? floatBitsToUint(around.x * axis) : uvec2(low) | uvec2(high) << 16);
  shape = floatBitsToUint(vec4(0.7213475204 * vec3(wide.z, -2. * wide.y, wide.x) / det, log2(opacity)));
  vec3 shown = mode == 1 || mode == 3 ? vec3(1. / p.z) : color(splat, normalize(away));
  look = floatBitsToUint(vec4(shown, turned ? around.y / around.x : -1.));
}`;

// Two triangles for each splat.
const QUAD = `${COMMON}
flat out vec2 mean; flat out vec4 shape; flat out vec3 look;
void main() {
  int at = gl_VertexID / 6, k = gl_VertexID % 6, corner = k > 2 ? 6 - k : k;
  uvec4 place = texelFetch(projected, texel(at, 0), 0);
  vec4 found = uintBitsToFloat(texelFetch(projected, texel(at, 2), 0));
  gl_Position = vec4(2, 2, 2, 1);
  if (found.w == 0.) return;
  mean = uintBitsToFloat(place.xy);
  shape = uintBitsToFloat(texelFetch(projected, texel(at, 1), 0));
  look = found.rgb;
  vec2 side = vec2(corner & 1, corner >> 1), by = 2. * side - 1., u = uintBitsToFloat(place.zw);
  vec2 end = mix(vec2(place.zw & 65535u), vec2(place.zw >> 16), side);
  if (found.w > 0.) end = mean + by.x * u + by.y * found.w * vec2(-u.y, u.x);
  gl_Position = vec4(2. * end / size - 1., 0, 1);
}`;

const PIXEL = `${COMMON}
flat in vec2 mean; flat in vec4 shape; flat in vec3 look; out vec4 pixel;
void main() {
  vec2 d = gl_FragCoord.xy - mean; // rows go down the picture
  float e = (shape.x * d.x + shape.y * d.y) * d.x + shape.z * d.y * d.y;
`;

const BLEND = `${PIXEL}
  if (shape.w - e < -7.994353) discard; // 1/255
  float alpha = min(0.99, exp2(shape.w - e));
  pixel = vec4(look * alpha, alpha);
}`;

// Centers and ellipsoids: as far as one standard deviation.
const SOLID = `${PIXEL}
  if (e > 0.7213475) discard;
  pixel = vec4(mode == 5 ? look * (1.1 - 0.6 * e * e) : look, 1);
}`;

// Shuts the pixels that no more light comes through: they are nearer than any splat from now on.
const SHUT = `${COMMON}
void main() { if (texelFetch(picture, ivec3(gl_FragCoord.xy, 0), 0).a >= 1e-4) discard; }`;

const FINISH = `${COMMON}
out vec4 pixel;
vec4 read(ivec2 at) { // what is seen there, and how much passes no further
  vec4 c = texelFetch(picture, ivec3(clamp(at, ivec2(0), ivec2(size) - 1), 0), 0);
  return vec4(c.rgb, front ? 1. - c.a : c.a);
}
vec3 point(ivec2 at) {
  vec4 seen = read(at);
  return vec3((vec2(at) + 0.5 - lens.zw) / lens.xy, 1) * seen.a / max(seen.r, 1e-9);
}
void main() {
  ivec2 at = ivec2(gl_FragCoord.x, size.y - gl_FragCoord.y), x = ivec2(1, 0), y = ivec2(0, 1);
  vec4 seen = read(at);
  vec3 shown = seen.rgb;
  if (mode == 1) { // blue, green, red
    float t = clamp((seen.r / max(seen.a, 1e-6) - range.x) / (range.y - range.x), 0., 1.);
    shown = seen.a * clamp(1.5 - abs(4. * t - vec3(3, 2, 1)), 0., 1.);
  }
  if (mode == 2) shown = seen.aaa;
  if (mode == 3) {
    vec3 n = cross(point(at + y) - point(at - y), point(at + x) - point(at - x));
    shown = seen.a * (0.5 + 0.5 * vec3(1, -1, -1) * normalize(n + vec3(0, 0, -1e-20)));
  }
  pixel = vec4(shown + (mode == 2 ? 0. : 1. - seen.a) * background, 1);
}`;

function Splats(canvas) {
  const gl = canvas.getContext("webgl2", { alpha: false, antialias: false, depth: false, preserveDrawingBuffer: true });
  if (!gl) throw new Error("this browser has no WebGL2");
  const float = gl.getExtension("EXT_color_buffer_float"), half = float || gl.getExtension("EXT_color_buffer_half_float");
  const front = !!(float && gl.getExtension("EXT_float_blend")), format = front ? gl.RGBA32F : half ? gl.RGBA16F : gl.RGBA8;
  gl.disable(gl.DITHER), gl.enable(gl.DEPTH_TEST), gl.clearColor(0, 0, 0, +front);
  // With 32-bit floats the nearest first, the alpha channel being the light that passes: pixels where none does are
  // shut and cost nothing more. With less, the farthest first, where rounding does the least harm.
  if (front) gl.blendFuncSeparate(gl.DST_ALPHA, gl.ONE, gl.ZERO, gl.ONE_MINUS_SRC_ALPHA);
  else gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  const programs = {
    project: program(WHOLE, PROJECT), blend: program(QUAD, BLEND), solid: program(QUAD, SOLID),
    shut: program(WHOLE, SHUT), finish: program(WHOLE, FINISH),
  };
  const textures = {}, framebuffers = {}, readers = Object.entries(READERS).map(([magic, read]) => `${magic}: ${read}`);
  const script = new Blob([`(${worker})({ ${readers} }, ${ROW})`], { type: "text/javascript" });
  const helper = new Worker(URL.createObjectURL(script));
  const splats = { gl, load, sort, draw, finished, count: 0, shown: 0, range: [1, 2] };
  let answer = Promise.resolve();
  return splats;

  // What the worker answers; it gets one question at a time.
  function ask(question, transfer = []) {
    return (answer = answer.catch(() => 0).then(() => new Promise((resolve, reject) => {
      helper.onmessage = ({ data }) => (data.error ? reject(new Error(data.error)) : resolve(data));
      helper.postMessage(question, transfer);
    })));
  }

  async function load(bytes) {
    const { geometry, sh, ...model } = await ask({ file: bytes.buffer }, [bytes.buffer]), rows = Math.ceil(model.count / ROW);
    if (rows > gl.getParameter(gl.MAX_TEXTURE_SIZE)) throw new Error(`${model.count} splats are too many for this browser`);
    texture("geometry", gl.RGBA32F, ROW, rows, 3, gl.RGBA, gl.FLOAT, geometry);
    texture("sh", gl.RGB16F, ROW, rows, (model.degree + 1) ** 2, gl.RGB, gl.FLOAT, sh);
    texture("projected", gl.RGBA32UI, ROW, rows, 3);
    framebuffer("projection", 3, "projected");
    Object.assign(splats, model, { shown: 0 });
    check();
  }

  async function sort(camera, near = NEAR) {
    const { order, ...found } = await ask({ camera, near });
    texture("order", gl.R32UI, ROW, order.length / ROW, 1, gl.RED_INTEGER, gl.UNSIGNED_INT, order);
    Object.assign(splats, found); // shown, range, ms
  }

  // look: {mode, scale, degree, background, near}; size: [width, height] of the picture, which the page stretches.
  function draw(camera, look, [width, height]) {
    const { shown, degree, antialiased, range: [near, far] } = splats, mode = MODES.indexOf(look.mode);
    if (!textures.picture || canvas.width !== width || canvas.height !== height) resize(width, height);
    const uniforms = {
      size: ["2f", width, height], lens: ["4f", ...lensAt(camera, width, height)], eye: ["3f", ...camera.place],
      turn: ["Matrix3fv", false, camera.turn], near: ["1f", look.near], scale: ["1f", look.scale], mode: ["1i", mode],
      degree: ["1i", Math.min(look.degree, degree)], antialiased: ["1i", antialiased], front: ["1i", front],
      shown: ["1i", shown], background: ["3f", ...look.background],
      range: ["2f", 1 / far / 1.02, 1.02 / near], // a wall that faces us has a range, too
    };
    for (const program of Object.values(programs)) {
      gl.useProgram(program);
      for (const [name, [kind, ...values]] of Object.entries(uniforms))
        gl["uniform" + kind](gl.getUniformLocation(program, name), ...values);
    }
    run("project", "projection", 0, 3, ROW, Math.ceil(shown / ROW));
    blend(mode >= 4 ? "solid" : "blend", shown);
    run("finish");
    check();
  }

  function blend(name, shown) {
    const step = Math.ceil(shown / (front ? PARTS : 1));
    gl.bindFramebuffer(gl.FRAMEBUFFER, framebuffers.target);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    gl.enable(gl.BLEND);
    for (let done = 0; done < shown; done += step) {
      if (done) run("shut", "shutter");
      gl.depthMask(false);
      run(name, "target", 6 * done, 6 * Math.min(step, shown - done));
      gl.depthMask(true);
    }
    gl.disable(gl.BLEND);
  }

  // Triangles by a program: the one of WHOLE, or those of QUAD for some splats.
  function run(name, target, first = 0, count = 3, width = canvas.width, height = canvas.height) {
    gl.bindFramebuffer(gl.FRAMEBUFFER, framebuffers[target] || null);
    gl.viewport(0, 0, width, height);
    gl.useProgram(programs[name]);
    gl.drawArrays(gl.TRIANGLES, first, count);
  }

  // When the picture is there; until then the page stays awake.
  async function finished() {
    const fence = gl.fenceSync(gl.SYNC_GPU_COMMANDS_COMPLETE, 0);
    gl.flush();
    while (gl.clientWaitSync(fence, 0, 0) === gl.TIMEOUT_EXPIRED) await new Promise((next) => setTimeout(next, 4));
    gl.deleteSync(fence);
  }

  function resize(width, height) {
    Object.assign(canvas, { width, height });
    texture("picture", format, width, height);
    texture("depth", gl.DEPTH_COMPONENT16, width, height);
    framebuffer("target", 1, "picture", "depth");
    framebuffer("shutter", 0, "picture", "depth");
  }

  // A new one takes the place of the old. content: format, type, data
  function texture(name, format, width, height, layers = 1, ...content) {
    const kind = gl.TEXTURE_2D_ARRAY;
    gl.deleteTexture(textures[name]);
    textures[name] = gl.createTexture();
    gl.activeTexture(gl.TEXTURE0 + TEXTURES.indexOf(name));
    gl.bindTexture(kind, textures[name]);
    gl.texStorage3D(kind, 1, format, width, height, layers);
    for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(kind, side, gl.NEAREST);
    if (content.length) gl.texSubImage3D(kind, 0, 0, 0, 0, width, height, layers, ...content);
  }

  function framebuffer(name, layers, picture, depth) {
    const places = Array.from({ length: layers }, (_, k) => gl.COLOR_ATTACHMENT0 + k);
    const attach = (place, texture, layer) => gl.framebufferTextureLayer(gl.FRAMEBUFFER, place, textures[texture], 0, layer);
    framebuffers[name] = framebuffers[name] || gl.createFramebuffer();
    gl.bindFramebuffer(gl.FRAMEBUFFER, framebuffers[name]);
    places.forEach((place, layer) => attach(place, picture, layer));
    if (depth) attach(gl.DEPTH_ATTACHMENT, depth, 0);
    gl.drawBuffers(places);
  }

  function program(...sources) {
    const program = gl.createProgram(), shaders = sources.map((source, k) => {
      const shader = gl.createShader([gl.VERTEX_SHADER, gl.FRAGMENT_SHADER][k]);
      gl.shaderSource(shader, source), gl.compileShader(shader), gl.attachShader(program, shader);
      return shader;
    });
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS))
      throw new Error(gl.getProgramInfoLog(program) + shaders.map((shader) => gl.getShaderInfoLog(shader)));
    gl.useProgram(program);
    TEXTURES.forEach((name, unit) => gl.uniform1i(gl.getUniformLocation(program, name), unit));
    return program;
  }

  function check() {
    const error = gl.getError();
    if (error) throw new Error(`WebGL2 error 0x${error.toString(16)}`);
  }
}

// fx, fy, cx, cy at this size: all of the camera's own picture is in it.
function lensAt({ fx, fy, width, height }, w, h) {
  const fit = Math.min(w / width, h / height);
  return [fx * fit, fy * fit, w / 2, h / 2];
}
