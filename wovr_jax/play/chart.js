/* Two small charts over the steps of an episode: how far the two pictures are apart, and who calls it a success. */

const CHART = { left: 34, right: 2, gap: 46, apart: 96, success: 56, top: 26, least: 24, highest: 0.06 };

function drawChart(at, episode, hello, shown) {
  const width = Math.max(at.clientWidth, 240), steps = episode.imagined.length - 1;
  const span = Math.max(CHART.least, hello.steps, Math.ceil(steps / 8) * 8, (episode.before || []).length);
  const x = (step) => CHART.left + (step / span) * (width - CHART.left - CHART.right);
  const parts = [];
  const panels = [];
  let top = CHART.top;
  const tag = (name, attributes, inside = "") =>
    `<${name} ${Object.entries(attributes).map(([key, value]) => `${key}="${value}"`).join(" ")}>${inside}</${name}>`;
  /** A line down through every chart, but not through the words between them. */
  const upright = (kind, at) => panels.forEach(([from, to]) => line(kind, at, from, at, to));
  const line = (kind, x1, y1, x2, y2) => parts.push(tag("line", { class: kind, x1, y1, x2, y2 }));
  const label = (kind, x, y, said, anchor = "start") => parts.push(tag("text", { class: kind, x, y, "text-anchor": anchor }, said));
  const path = (kind, values, y) => {
    if (values.length) parts.push(tag("polyline", { class: kind, points: values.map((value, i) => `${x(i + 1).toFixed(1)},${y(value).toFixed(1)}`).join(" ") }));
  };

  if (hello.simulator) {
    const high = Math.max(CHART.highest, ...episode.apart), bottom = top + CHART.apart;
    panels.push([top, bottom]);
    const y = (value) => bottom - (Math.min(value, high) / high) * CHART.apart;
    label("name", 0, top - 13, "How much of the picture differs");
    const between = high <= 0.12 ? 0.02 : high <= 0.3 ? 0.05 : 0.2;
    for (let tick = 0; tick <= high + 1e-9; tick += between) {
      line("rule", CHART.left, y(tick), width - CHART.right, y(tick));
      label("", CHART.left - 6, y(tick) + 4, `${Math.round(100 * tick)}%`, "end");
    }
    line("limit", CHART.left, y(hello.apart), width - CHART.right, y(hello.apart));
    path("line before", episode.before || [], y);
    if (episode.apart.length) {
      const last = x(episode.apart.length).toFixed(1), points = episode.apart.map((value, i) => `${x(i + 1).toFixed(1)},${y(value).toFixed(1)}`);
      parts.push(tag("polygon", { class: "under", points: [`${x(1).toFixed(1)},${bottom}`, ...points, `${last},${bottom}`].join(" ") }));
    }
    path("line", episode.apart, y);
    if (episode.left !== null && episode.left < episode.apart.length) {
      const gone = x(episode.left + 1);
      line("gone", gone, top, gone, bottom);
      label("imagined", width - CHART.right, top - 13, `left the truth at step ${episode.offset + episode.left + 1}`, "end");
    }
    top = bottom + CHART.gap;
  }
  const bottom = top + CHART.success, y = (value) => bottom - value * CHART.success;
  panels.push([top, bottom]);
  label("name", 0, top - 13, "Success");
  if (hello.threshold !== null) {
    label("imagined", width - CHART.right, top - 13, "as the judge sees the imagined picture", "end");
  }
  line("rule", CHART.left, y(0), width - CHART.right, y(0));
  line("rule", CHART.left, y(1), width - CHART.right, y(1));
  label("", CHART.left - 6, y(0) + 4, "0", "end");
  label("", CHART.left - 6, y(1) + 4, "1", "end");
  if (hello.threshold !== null) line("limit", CHART.left, y(hello.threshold), width - CHART.right, y(hello.threshold));
  for (let i = 0, end; i < episode.truth.length; i = end) {
    for (end = i + 1; end < episode.truth.length && episode.truth[end] === episode.truth[i]; end++);
    if (episode.truth[i]) parts.push(tag("rect", { class: "band true", x: x(i + 0.5), y: top, width: x(end + 0.5) - x(i + 0.5), height: CHART.success }));
  }
  const first = episode.truth.findIndex(Boolean);
  if (first >= 0) label("true", Math.min(x(first + 0.5) + 6, width - 74), bottom - 7, "true success");
  path("line imagined", episode.prob, y);
  if (episode.offset + span > hello.steps && hello.steps - episode.offset < span && hello.steps > episode.offset) {
    const end = x(hello.steps - episode.offset);
    upright("rule", end);
    label("", end - 4, bottom + 16, `the run's episodes end at ${hello.steps}`, "end");
  }
  if (shown > 0) upright("at", x(shown));
  if (shown > 0 && episode.apart.length >= shown) {
    const high = Math.max(CHART.highest, ...episode.apart);
    parts.push(tag("circle", { class: "dot", r: 4, cx: x(shown), cy: CHART.top + CHART.apart * (1 - episode.apart[shown - 1] / high) }));
  }
  if (shown > 0 && episode.prob.length >= shown) parts.push(tag("circle", { class: "dot imagined", r: 4, cx: x(shown), cy: y(episode.prob[shown - 1]) }));
  const height = bottom + 20;
  at.innerHTML = tag("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "Distance of the two worlds and success, step by step" }, parts.join(""));
  return (pixel) => Math.round(((pixel - CHART.left) / (width - CHART.left - CHART.right)) * span);
}
