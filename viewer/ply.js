// The reader of .ply files, for pages that may be given one.

READERS.ply = function (bytes, room) {
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
  const put = room(splats, degree, header.some((line) => /^comment (SplatRenderMode: mip|antialiased 1)$/.test(line)));
  const data = new Float32Array(bytes.slice(start, start + 4 * names.length * splats).buffer);
  const columns = (...names) => names.map((name) => column[name]), three = (name) => columns(...[0, 1, 2].map(name));
  const place = columns("x", "y", "z"), sizes = three((c) => `scale_${c}`), turn = columns("rot_1", "rot_2", "rot_3", "rot_0");
  const colors = Array.from({ length: rest + 1 }, (_, k) => three((c) => (k ? `f_rest_${c * rest + k - 1}` : `f_dc_${c}`)));
  for (let i = 0; i < splats; i++) {
    const of = (columns) => columns.map((column) => data[i * names.length + column]);
    const opacity = 1 / (1 + Math.exp(-data[i * names.length + column.opacity]));
    put(i, [...of(place), opacity], of(sizes).map(Math.exp), of(turn), (k) => of(colors[k]));
  }
};
