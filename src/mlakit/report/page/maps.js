// Maps over two sizes: who is the fastest, how much faster one is, and up to where decode was.
const FASTEST = "\u0000fastest";
function drawMap(jobs) {
  const rows = jobs.flatMap(rowsOf).filter((row) => row.time && isNumber(row.time));
  const sizes = axes(rows).filter((axis) => rows.some((row) => isNumber(JOBS[row.job].sizes[axis])));
  const pairs = [];
  for (const x of sizes)
    for (const y of sizes) {
      const best = x === y ? undefined : groups(rows, [x, y]).find(isGrid(x, y));
      if (best) pairs.push({ x, y, points: best.points });
    }
  element("map-section").hidden = !pairs.length;
  if (!pairs.length) return;
  const biggest = pairs.reduce((a, b) => (b.points > a.points ? b : a));
  const x = options(
    "map-x",
    distinct(pairs.map((pair) => pair.x)).map((name) => [name, words(name)]),
    biggest.x,
  );
  const y = options(
    "map-y",
    distinct(pairs.filter((pair) => pair.x === x).map((pair) => pair.y)).map((name) => [name, words(name)]),
    biggest.y,
  );
  const found = groups(rows, [x, y]).filter(isGrid(x, y));
  const where = Number(
    options(
      "map-where",
      found.map((group, i) => [String(i), group.name]),
      "0",
    ),
  );
  element("map-where-label").hidden = found.length < 2;
  const mine = found[where].rows,
    names = distinct(mine.map((row) => row.backend));
  const of = options(
    "map-what",
    [[FASTEST, "the fastest backend"], ...names.map((name) => [name, `speed of ${name}`])],
    FASTEST,
  );
  const value = (row, axis) => traits(row)[axis];
  const order = (axis) => distinct(mine.map((row) => value(row, axis))).sort((a, b) => a - b);
  const across = order(x),
    up = order(y);
  const cell = (a, b) => ranked(mine.filter((row) => value(row, x) === a && value(row, y) === b));
  const grid = (draw) => up.map((b) => across.map((a) => draw(cell(a, b), a, b)));
  const at = (cells) => cells.map((row) => row.map((entry) => entry?.z ?? null));
  const texts = (cells, part) => cells.map((row) => row.map((entry) => entry?.[part] ?? ""));
  const fastest = of === FASTEST;
  const room = element("map").clientWidth / (across.length + 1);
  const cells = grid((all) => {
    const row = fastest ? all[0] : all.find((one) => one.backend === of);
    if (!row) return null;
    const next = fastest
      ? all.find((one) => one !== row)
      : chosen.baseline === OTHERS || chosen.baseline === of
        ? all.find((one) => one !== row)
        : all.find((one) => one.backend === chosen.baseline);
    const gain = next ? next.time / row.time : null;
    const lines = [
      `<b>${safe(row.backend)}</b> ${time(row.time)}`,
      ...all
        .filter((one) => one !== row)
        .slice(0, 6)
        .map((one) => `${safe(one.backend)} ${time(one.time)}`),
    ];
    const named = room >= 7 * row.backend.length; // px of a label's letters
    if (fastest)
      return {
        z: names.indexOf(row.backend),
        text: [named ? safe(row.backend) : "", gain && room >= 34 ? factor(gain) : ""].filter(Boolean).join("<br>"),
        hover: lines.join("<br>"),
      };
    return gain ? { z: Math.log2(gain), text: factor(gain), hover: lines.join("<br>") } : null;
  });
  const edge = Math.max(0.3, ...at(cells).flat().filter(known).map(Math.abs));
  const steps = names.flatMap((name, i) => [
    [i / names.length, look(name).colour],
    [(i + 1) / names.length, look(name).colour],
  ]);
  const versus = chosen.baseline === OTHERS || chosen.baseline === of ? "the fastest other" : chosen.baseline;
  const winners = distinct(
    cells
      .flat()
      .filter(known)
      .map((entry) => names[entry.z]),
  );
  if (fastest)
    element("map-hint").replaceChildren(
      "Who is the fastest, and how many times as fast as the next: ",
      ...winners.flatMap((name) => [dotOf(name), `${name} `]),
    );
  else element("map-hint").textContent = `How many times as fast as ${versus}: blue is faster, orange slower.`;
  drawGrid(
    "map",
    across,
    up,
    cells,
    {
      zmin: fastest ? -0.5 : -edge,
      zmax: fastest ? names.length - 0.5 : edge,
      colorscale: fastest
        ? steps
        : [
            [0, "#C84E00"],
            [0.5, isDark() ? "#2a3139" : "#eef0f2"],
            [1, "#0072B2"],
          ],
      text: texts(cells, "text"),
      hovertext: texts(cells, "hover"),
      z: at(cells),
      textfont: fastest ? { color: isDark() ? "#14181d" : "#ffffff" } : {},
    },
    words(x),
    words(y),
  );
}
const isGrid = (x, y) => (group) => {
  const values = (axis) => distinct(group.rows.map((row) => traits(row)[axis])).length;
  return values(x) > 1 && values(y) > 1 && group.points > values(x) + values(y) - 1;
};
function drawGrid(id, across, up, cells, heat, x_title, y_title) {
  plot(
    id,
    cells.length
      ? [
          {
            type: "heatmap",
            x: across.map((_, i) => i),
            y: up.map((_, i) => i),
            hoverinfo: "text",
            showscale: false,
            xgap: 2,
            ygap: 2,
            texttemplate: "%{text}",
            ...heat,
            textfont: { size: narrow() ? 9 : 12, ...heat.textfont },
          },
        ]
      : [],
    {
      height: 90 + 46 * Math.max(up.length, 2),
      margin: { l: 10, r: 10, t: 10, b: 48 },
      xaxis: {
        title: { text: safe(x_title) },
        tickmode: "array",
        tickvals: across.map((_, i) => i),
        ticktext: across.map(String),
        showgrid: false,
        zeroline: false,
      },
      yaxis: {
        title: { text: safe(y_title) },
        tickmode: "array",
        tickvals: up.map((_, i) => i),
        ticktext: up.map(String),
        showgrid: false,
        zeroline: false,
      },
    },
  );
}

// Up to which q_len decode was faster, over requests and keys.
function drawThreshold() {
  if (!element("threshold")) return;
  const names = distinct(DATA.thresholds.map((found) => `${found.backend}, ${found.record}`));
  const of = options(
    "threshold-of",
    names.map((name) => [name, name]),
    names[0],
  );
  const mine = DATA.thresholds.filter((found) => `${found.backend}, ${found.record}` === of);
  const order = (axis) => distinct(mine.map((found) => found[axis])).sort((a, b) => a - b);
  const across = order("batch"),
    up = order("keys");
  const cells = up.map((keys) =>
    across.map((batch) => mine.find((found) => found.batch === batch && found.keys === keys)),
  );
  drawGrid(
    "threshold",
    across,
    up,
    cells,
    {
      z: cells.map((row) => row.map((found) => (found ? Math.log2(found.threshold + 1) : null))),
      text: cells.map((row) => row.map((found) => (found ? `${found.longest ? "≥ " : ""}${found.threshold}` : ""))),
      hovertext: cells.map((row) => row.map((found) => (found ? safe(found.text) : ""))),
      colorscale: [
        [0, isDark() ? "#1f2933" : "#e3edf5"],
        [1, isDark() ? "#28608f" : "#7db8de"],
      ],
      textfont: { color: style("--text") },
    },
    "requests",
    "keys",
  );
}
