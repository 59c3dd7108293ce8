// How near rows come to what the device does at best, by what binds them.
function drawRoofline(jobs) {
  const rows = jobs.flatMap(rowsOf).filter((row) => row.time && row.flops && row.bytes);
  const devices = distinct(jobs.map((job) => job.device));
  const dtypes = distinct(jobs.map((job) => job.sizes.dtype).filter(known));
  const all = DATA.roofs.filter((roof) => devices.includes(roof.device));
  const roofs = all.some((roof) => dtypes.includes(roof.dtype))
    ? all.filter((roof) => dtypes.includes(roof.dtype))
    : all;
  element("roofline-section").hidden = !rows.length || !roofs.length;
  if (!rows.length || !roofs.length) return;
  const spread = rows.map((row) => row.flops / row.bytes);
  const ridges = roofs.map((roof) => roof.flops / roof.bytes);
  const low = Math.min(least(spread), least(ridges)) / 3,
    high = Math.max(most(spread), most(ridges)) * 3;
  const traces = roofs.map((roof) => {
    const x = [low, roof.flops / roof.bytes, high];
    const device = devices.length > 1 ? `${roof.device}, ` : "";
    const name = `${device}${roof.dtype}: ${rate(roof.bytes, "B/s")}, ${rate(roof.flops, "FLOP/s")}`;
    return {
      type: "scatter",
      mode: "lines",
      name: safe(name),
      x,
      y: x.map((v) => Math.min(v * roof.bytes, roof.flops)),
      hoverinfo: "name",
      line: { color: style("--dim"), width: 2 },
    };
  });
  for (const name of distinct(rows.map((row) => row.backend))) {
    const mine = rows.filter((row) => row.backend === name);
    traces.push({
      type: "scatter",
      mode: "markers",
      name: safe(name),
      x: mine.map((row) => row.flops / row.bytes),
      y: mine.map((row) => row.flops / row.time),
      marker: marker(name),
      hovertext: mine.map(
        (row) => `${hover(row)}<br>${rate(row.flops / row.time, "FLOP/s")}, ${rate(row.bytes / row.time, "B/s")}`,
      ),
      hoverinfo: "text",
    });
  }
  const reached = traces.flatMap((trace) => trace.y);
  const legend_lines = legendLines(traces);
  element("roofline-hint").textContent =
    "Operations a second over operations a byte, both as the job needs them at least. The line is what this device " +
    "reached at best: left of its bend memory is the limit, right of it the units that multiply.";
  plot("roofline", traces, {
    height: 420 + 22 * legend_lines,
    margin: { l: 10, r: 14, t: 16 + 22 * legend_lines, b: 48 },
    showlegend: legend_lines > 0,
    xaxis: {
      title: { text: "FLOP a byte (log scale)" },
      type: "log",
      range: [Math.log10(low), Math.log10(high)],
      dtick: 1,
    },
    yaxis: { title: { text: narrow() ? "" : "reached (log scale)" }, ...ticks(reached, true, "FLOP") },
  });
}
