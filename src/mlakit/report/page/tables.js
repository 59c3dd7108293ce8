// The answer first: who is the fastest at each batch.
const FIRST_JOBS = 12,
  FIRST_ROWS = 40;

function drawFastest(jobs) {
  const table = element("fastest");
  const versus = chosen.baseline === OTHERS ? "than the next" : `than ${chosen.baseline}`;
  const limited = jobs.some((job) => rowsOf(job).some(ofLimit));
  const head = [
    ["batch", ""],
    ["fastest", ""],
    ["time", "number"],
    [`faster ${versus}`, "number"],
    ...(limited ? [["of the limit", "number wide"]] : []),
  ];
  const count = chosen.all ? jobs.length : Math.min(jobs.length, FIRST_JOBS);
  const body = jobs.slice(0, count).map((job) => {
    const rows = rowsOf(job),
      best = ranked(rows)[0];
    const open = () => {
      element("search").value = chosen.search = chosen.search === job.title ? "" : job.title;
      render();
    };
    const line = make(
      "tr",
      {
        title: "show this batch alone",
        tabIndex: 0,
        onclick: open,
        onkeydown: (event) => event.key === "Enter" && open(),
      },
      make("td", { className: "name" }, ...breakable(job.title), where(job)),
    );
    if (!best) {
      line.append(make("td", { colSpan: 4, className: "bad" }, rows.length ? "none has a time" : "all are hidden"));
      return line;
    }
    const ties = tiedWith(best, rows),
      gain = speedup(best),
      limit = ofLimit(best);
    const dot = dotOf(best.backend);
    line.append(
      make(
        "td",
        { className: "winner name" },
        dot,
        ...breakable(best.backend),
        ties.length ? make("small", {}, `within its interval: ${ties.map((row) => row.backend).join(", ")}`) : null,
        ranked(rows).length === 1 ? make("small", {}, "the only one with a time") : null,
      ),
      make("td", { className: "number" }, time(best.time), make("small", {}, interval(best))),
      make(
        "td",
        { className: "number" },
        gain && gain.base !== best ? factor(gain.value) : "",
        gain && gain.base !== best ? make("small", {}, `over ${gain.base.backend}`) : null,
      ),
      ...(limited ? [make("td", { className: "number wide" }, limit ? percent(limit) : "")] : []),
    );
    return line;
  });
  table.replaceChildren(
    make(
      "thead",
      {},
      make("tr", {}, ...head.map(([text, className]) => make("th", { className, scope: "col" }, text))),
    ),
    make("tbody", {}, ...body),
  );
  const of = jobsOfOperation().length,
    count_words = `${of} ${of === 1 ? "batch" : "batches"}`;
  element("fastest-hint").textContent = !jobs.length
    ? `None of ${count_words} has this in its name.`
    : jobs.length < of
      ? `${jobs.length} of ${count_words}${jobs.length === 1 ? "; choose it again for all" : ""}.`
      : of > 1
        ? `${count_words}; choose one to see it alone.`
        : "";
  const more = element("more");
  more.hidden = jobs.length <= FIRST_JOBS;
  more.textContent = chosen.all ? `show ${FIRST_JOBS}` : `show all ${jobs.length}`;
}

// A long name may break after a mark, and not within a word.
const breakable = (text) =>
  text.split(/(?<=[_+·,/x])/).flatMap((part, index) => (index ? [make("wbr"), part] : [part]));

function dotOf(backend) {
  const dot = make("i", { className: "dot" });
  dot.style.background = look(backend).colour;
  return dot;
}

// What a batch is, in words: its sizes that are not the same in all of its operation.
function where(job) {
  const parts = [];
  if (!chosen.operation) parts.push(job.operation);
  if (job.phase && !job.title.includes(job.phase) && !job.operation.includes(job.phase)) parts.push(job.phase);
  if (job.model && !chosen.model && MODELS().length > 1 && !job.title.includes(job.model)) parts.push(job.model);
  for (const [name, value] of Object.entries(job.sizes)) {
    if (isNumber(value) && varying().has(name) && !job.title.includes(`${name} ${value}`))
      parts.push(`${value} ${value === 1 ? words(name).replace(/s$/, "") : words(name)}`);
  }
  return parts.length ? make("small", {}, parts.join(", ")) : null;
}
let varies = { operation: null, names: new Set() };
function varying() {
  if (varies.operation !== chosen.operation) {
    const jobs = JOBS.filter((job) => !chosen.operation || job.operation === chosen.operation);
    const names = distinct(jobs.flatMap((job) => Object.keys(job.sizes)));
    varies = {
      operation: chosen.operation,
      names: new Set(names.filter((name) => distinct(jobs.map((job) => job.sizes[name])).length > 1)),
    };
  }
  return varies.names;
}
const MODELS = () =>
  distinct(
    JOBS.filter((job) => !chosen.operation || job.operation === chosen.operation).map((job) => job.model),
  ).filter(Boolean);

// Every measurement, in the order of any column.
const SEVERAL_RECORDS = distinct(ROWS.map((row) => row.record)).length > 1;
const COLUMNS = [
  { title: "batch", value: (row) => row.job, show: (row) => JOBS[row.job].title, className: "name" },
  { title: "backend", value: (row) => row.backend, show: (row) => row.backend, className: "name" },
  { title: "time", value: (row) => row.time, show: (row) => (row.time ? time(row.time) : row.words), number: true },
  {
    title: "95% interval",
    value: (row) => (known(row.high) && row.time ? (row.high - row.low) / row.time : null),
    show: interval,
    number: true,
    wide: true,
  },
  { title: "speed-up", value: (row) => speedup(row)?.value ?? null, show: showSpeedup, number: true },
  {
    title: "of the limit",
    value: ofLimit,
    show: (row) => (ofLimit(row) ? percent(ofLimit(row)) : ""),
    number: true,
    wide: true,
  },
  {
    title: "memory",
    value: (row) => row.memory,
    show: (row) => (known(row.memory) ? size(row.memory) : ""),
    number: true,
    wide: true,
  },
  {
    title: "host",
    value: (row) => row.host,
    show: (row) => (row.host ? time(row.host) : ""),
    number: true,
    wide: true,
  },
  { title: "notes", value: notes, show: notes, className: "name", wide: true },
  {
    title: "record",
    value: (row) => (SEVERAL_RECORDS ? row.record : null),
    show: (row) => row.record,
    className: "name",
    wide: true,
  },
];

function showSpeedup(row) {
  const gain = speedup(row);
  return gain ? (gain.base === row ? "baseline" : factor(gain.value)) : "";
}
function notes(row) {
  const parts = [];
  if (row.reason) parts.push(row.reason);
  if (row.predicted) parts.push("predicted, not measured");
  if (row.checked === false) parts.push("result not checked");
  if (row.throttled.length) parts.push(`held back: ${row.throttled.join(", ")}`);
  if (row.host && row.time && row.host > row.time) parts.push("the host takes longer than the device");
  return parts.join("; ");
}

function drawRows(jobs) {
  const rows = jobs.flatMap((job) => rowsOf(job));
  const columns = COLUMNS.filter(
    (column) => column.title === "batch" || rows.some((row) => known(column.value(row)) && column.show(row) !== ""),
  );
  const ordered = jobs.flatMap((job) => {
    const mine = rowsOf(job);
    return [...byTime(mine), ...mine.filter((row) => !row.time)];
  });
  const column = chosen.sort && COLUMNS[chosen.sort.column];
  if (column) {
    const sign = chosen.sort.descending ? -1 : 1;
    ordered.sort((a, b) => {
      const [x, y] = [column.value(a), column.value(b)];
      if (!known(x) || !known(y)) return known(y) - known(x); // what has no value comes last, either way
      return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
    });
  }
  const several = jobs.map((job) => ranked(rowsOf(job))).filter((mine) => mine.length > 1);
  const bests = new Set(several.map((mine) => mine[0]));
  const head = columns.map((column) => {
    const index = COLUMNS.indexOf(column),
      sorted = chosen.sort?.column === index;
    const sort = () => {
      chosen.sort = { column: index, descending: sorted ? !chosen.sort.descending : false };
      drawRows(jobs);
      element("rows").querySelectorAll("th button")[columns.indexOf(column)].focus();
    };
    const cell = make(
      "th",
      { scope: "col", className: classes(column) },
      make("button", { type: "button", onclick: sort }, column.title),
    );
    if (sorted) cell.setAttribute("aria-sort", chosen.sort.descending ? "descending" : "ascending");
    return cell;
  });
  const count = chosen.every ? ordered.length : Math.min(ordered.length, FIRST_ROWS);
  const body = ordered.slice(0, count).map((row) =>
    make(
      "tr",
      { className: bests.has(row) ? "best" : "" },
      ...columns.map((column) => {
        const failed = !row.time && column.title === "time";
        const cell = make(
          "td",
          { className: classes(column) + (failed ? " bad" : "") },
          ...(column.number ? [column.show(row)] : breakable(column.show(row))),
        );
        if (column.title === "batch" && !chosen.operation) cell.append(make("small", {}, JOBS[row.job].operation));
        return cell;
      }),
    ),
  );
  element("rows").replaceChildren(make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body));
  const more = element("more-rows");
  more.hidden = ordered.length <= FIRST_ROWS;
  more.textContent = chosen.every ? `show ${FIRST_ROWS}` : `show all ${ordered.length}`;
  more.onclick = () => {
    chosen.every = !chosen.every;
    drawRows(jobs);
  };
  const without = ordered.filter((row) => !row.time).length;
  element("rows-hint").textContent =
    `${ordered.length} rows${without ? `, ${without} without a time` : ""}; a column's head sorts by it.`;
}
const classes = (column) =>
  [column.className, column.number && "number", column.wide && "wide"].filter(Boolean).join(" ");

// How far outputs were from one another, from the study `correctness`.
function drawDifferences() {
  const table = element("differences");
  if (!table) return;
  const groups = new Map();
  for (const found of DATA.differences) {
    const key = JSON.stringify([found.record, found.phase, found.batch, found.first, found.second]);
    groups.set(key, [...(groups.get(key) ?? []), found]);
  }
  const relative = (found) => found.relative ?? Infinity;
  const body = [...groups.values()].map((all) => {
    const worst = all.reduce((a, b) => (relative(b) > relative(a) ? b : a));
    const agrees = all.every((found) => found.agrees);
    return make(
      "tr",
      {},
      make("td", {}, worst.phase),
      make("td", { className: "number" }, String(worst.batch)),
      make("td", { className: "name" }, `${worst.first} and ${worst.second}`),
      make(
        "td",
        { className: agrees ? "number" : "number bad" },
        known(worst.relative) ? three(worst.relative) : "not finite",
      ),
      make("td", { className: agrees ? "" : "bad" }, agrees ? "agree" : "disagree"),
    );
  });
  const bad = DATA.differences.filter((found) => !found.agrees).length,
    count = DATA.differences.length;
  element("differences-said").textContent = bad
    ? `${bad} of ${count} comparisons disagree`
    : `All ${count} comparisons agree; the largest difference is ${three(most(DATA.differences.map(relative)))}`;
  element("differences-said").className = bad ? "bad" : "";
  element("differences-all").open = bad > 0;
  const head = [
    ["phase", ""],
    ["requests", "number"],
    ["compared", ""],
    ["relative difference", "number"],
    ["", ""],
  ];
  table.replaceChildren(
    make(
      "thead",
      {},
      make("tr", {}, ...head.map(([text, className]) => make("th", { scope: "col", className }, text))),
    ),
    make("tbody", {}, ...body),
  );
}
