// Draws the views of the report with Observable Plot, and keeps one selection and one choice.
// Names from files reach the page as text alone: textContent, or Plot's own text nodes.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const rows = data.rows.map((row, index) => ({ ...row, index }));
  const robust = data.measures.filter((measure) => measure !== "clean");
  const byId = (id) => document.getElementById(id);
  const ROLES = {
    grid: "circle", line: "circle", uniform: "diamond", greedy: "cross", learned: "square",
    dial: "wye", merge: "triangle2", pretrained: "star", ingredient: "triangle",
  };
  const SHARES = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7f7f7f"];
  const state = {
    split: data.shown, measure: robust[0] ?? "clean", maximise: data.rule.maximise, required: "clean",
    threshold: 0, choice: null, selected: null,
  };

  // Accuracies.

  const score = (row, measure, split = state.split) => row.scores[split]?.[measure];
  const isSoup = (row) => !["ingredient", "pretrained"].includes(row.role);
  const share = (row, measure, split) => score(row, measure, split)?.[0];
  const has = (measure) => (row) => score(row, measure) !== undefined;
  const percent = (value) => (100 * value).toFixed(1);
  const describe = (entry) =>
    entry ? `${percent(entry[0])} % [${percent(entry[1])}, ${percent(entry[2])}]` : "not measured";

  function tipOf(row) {
    const lines = [row.name, row.what];
    for (const measure of data.measures) lines.push(`${measure} ${describe(score(row, measure))}`);
    const any = Object.values(row.scores[state.split] ?? {})[0];
    if (any) lines.push(`on ${any[4]} samples of ${state.split}`);
    if (row.screened && state.split === data.selectOn) lines.push(row.doubt);
    return lines.join("\n");
  }

  // The rule for the best soup, as `robustsoup.soups.selection.select` applies it.

  function requirements() {
    return { ...data.rule.require, [state.required]: state.threshold };
  }

  function shortfall(row, require) {
    let total = 0;
    for (const [measure, threshold] of Object.entries(require))
      total += Math.max(threshold - (row.bounds[measure] ?? 0), 0);
    return total;
  }

  // At the run's own goal this is the choice that the run made and reports above.
  function isGoalOfRun() {
    const own = data.rule.require;
    return state.maximise === data.rule.maximise
      && Object.entries(requirements()).every(([measure, threshold]) => threshold === (own[measure] ?? 0));
  }

  // The knee weighs each measure by the inverse of its range on the front of the soups that compete.
  function termsOf(goal, soups) {
    const terms = data.rule.goals[goal];
    if (goal !== "knee") return terms;
    const points = soups.map((row) => terms.map(([, measure]) => share(row, measure, data.selectOn)));
    const dominates = (a, b) => a.every((value, k) => value >= b[k]) && a.some((value, k) => value > b[k]);
    const front = points.filter((point) => !points.some((other) => dominates(other, point)));
    return terms.map(([, measure], k) => {
      const [low, high] = d3.extent(front, (point) => point[k]);
      return [high > low ? 1 / (high - low) : 1, measure];
    });
  }
  const measuresOf = (goal) => data.rule.goals[goal].map(([, measure]) => measure);

  function choose() {
    const made = rows.find((row) => row.name === data.rule.chosen);
    if (made && isGoalOfRun()) return { row: made, met: data.rule.met };
    const measured = (row) => measuresOf(state.maximise).every((measure) => score(row, measure, data.selectOn));
    let candidates = rows.filter((row) => row.candidate && measured(row));
    const confirmed = candidates.filter((row) => !row.screened);
    if (confirmed.length) candidates = confirmed;
    if (!candidates.length) return { row: null, met: false };
    const require = requirements();
    const least = d3.min(candidates, (row) => shortfall(row, require));
    const eligible = candidates.filter((row) => shortfall(row, require) === least);
    const terms = termsOf(state.maximise, eligible);
    const scoreOf = (row) => d3.sum(terms, ([weight, measure]) => weight * (share(row, measure, data.selectOn) ?? Number.NaN));
    const rank = (row) => [scoreOf(row), share(row, "clean", data.selectOn) ?? 0];
    let best = null;
    for (const row of eligible) {
      const [first, second] = rank(row);
      if (!best || first > best.first || (first === best.first && second > best.second))
        best = { row, first, second };
    }
    return { row: best.row, met: least === 0 };
  }

  function describeRequirements() {
    const parts = Object.entries(requirements())
      .filter(([, threshold]) => threshold > 0)
      .map(([measure, threshold]) => `${measure} of at least ${percent(threshold)} %`);
    return parts.length ? `with ${parts.join(" and ")}` : "without a requirement";
  }

  function showChoice() {
    const { row, met } = choose();
    state.choice = row;
    const goal = `The ${state.maximise === "knee" ? "" : "highest "}${state.maximise} ${describeRequirements()}`;
    let text = "No soup was measured that the rule could take.";
    if (row) {
      const figures = [...new Set([...measuresOf(state.maximise), state.required, "clean"])]
        .map((measure) => `${measure} ${describe(score(row, measure, data.selectOn))}`).join(", ");
      const verdict = met ? `${goal}: ${row.name}` : `${goal}: no soup meets that; the closest is ${row.name}`;
      text = `${verdict} (${row.what}), ${figures} on ${data.selectOn}.`;
    }
    byId("choice").textContent = text;
    byId("choice").dataset.name = row?.name ?? "";
    byId("threshold-text").textContent = `${percent(state.threshold)} %`;
  }

  // Small parts of the page.

  function make(tag, text, attributes = {}) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  }

  function fillSelect(id, values, current, onChange) {
    const select = byId(id);
    for (const [value, text] of values) select.append(make("option", text, { value }));
    select.value = current;
    select.addEventListener("change", () => onChange(select.value));
    if (values.length < 2) select.parentElement.hidden = true;
  }

  function showCard() {
    const row = state.selected;
    const card = byId("selected");
    card.replaceChildren();
    if (!row) return;
    card.dataset.name = row.name;
    card.append(make("h3", row.name), make("div", `${row.role}: ${row.what}`));
    if (row === state.choice) card.append(make("div", "The rule takes this soup."));
    const table = make("table");
    for (const split of data.splits)
      for (const measure of data.measures) {
        const entry = score(row, measure, split);
        if (!entry) continue;
        const line = make("tr");
        line.append(make("th", `${measure}, ${split}`, { scope: "row" }), make("td", describe(entry)));
        table.append(line);
      }
    card.append(table);
    if (row.screened) card.append(make("div", `On ${data.selectOn}, its ${row.doubt}.`));
  }

  // Pictures.

  // With a legend, a plot is a figure whose last child is the picture.
  const pictureOf = (plot) => (plot.matches("svg") ? plot : [...plot.querySelectorAll(":scope > svg")].at(-1));

  function mount(place, plot, label) {
    for (const svg of plot.matches("svg") ? [plot] : plot.querySelectorAll("svg")) {
      if (svg === pictureOf(plot)) { svg.setAttribute("role", "img"); svg.setAttribute("aria-label", label); }
      else svg.setAttribute("aria-hidden", "true");
      for (const part of svg.querySelectorAll("[aria-label]")) part.removeAttribute("aria-label");
    }
    place.replaceChildren(plot);
  }

  const widthOf = (place) => Math.max(260, Math.floor(place.clientWidth || 600));

  // Selects the network that the tip shows, or without a tip (on a touch screen) the nearest one.
  // Not on "click": Plot redraws its tip when the pointer is pressed, and a browser sends no click
  // where the pressed node is gone. Plot's scales hold places in pixels of the picture.
  function selectByPointer(plot, points, x, y) {
    plot.addEventListener("pointerup", (event) => {
      const [px, py] = d3.pointer(event, pictureOf(plot));
      const distance = (row) => Math.hypot(plot.scale("x").apply(x(row)) - px, plot.scale("y").apply(y(row)) - py);
      const nearest = d3.least(points, distance);
      if (nearest && distance(nearest) < 30) select(plot.value ?? nearest);
    });
  }

  function marksOfInterest(points, x, y) {
    const only = (row) => points.filter((item) => item === row);
    return [
      Plot.dot(only(state.choice), { x, y, r: 11, stroke: "var(--accent)", strokeWidth: 2.5, className: "ring-choice" }),
      Plot.dot(only(state.selected), { x, y, r: 7.5, stroke: "var(--ink)", strokeWidth: 2.5, className: "ring-selected" }),
    ];
  }

  function frontOf(points, measure) {
    const ordered = [...points].sort((a, b) => share(b, "clean") - share(a, "clean") || share(b, measure) - share(a, measure));
    const front = [];
    for (const row of ordered)
      if (!front.length || share(row, measure) > share(front.at(-1), measure)) front.push(row);
    return front;
  }

  function drawFront() {
    const place = byId("front");
    const measure = state.measure;
    const points = rows.filter((row) => has("clean")(row) && has(measure)(row));
    const x = (row) => 100 * share(row, "clean");
    const y = (row) => 100 * share(row, measure);
    const end = (name, k) => (row) => 100 * score(row, name)[k];
    const withBars = points.filter((row) => row.role === "ingredient" || row === state.choice || row === state.selected);
    const bars = { stroke: "var(--soft)", strokeOpacity: 0.7 };
    const roles = Object.keys(ROLES).filter((role) => points.some((row) => row.role === role));
    const lines = Object.entries(requirements()).filter(([, threshold]) => threshold > 0);
    const rule = { stroke: "var(--accent)", strokeDasharray: "5 4", className: "requirement" };
    const width = widthOf(place);
    const plot = Plot.plot({
      width, height: Math.min(440, Math.max(320, width * 0.66)), marginLeft: 44, marginBottom: 44, inset: 14, grid: true,
      x: { label: `clean accuracy on ${state.split} (%) →`, labelAnchor: "right", nice: true },
      y: { label: `↑ ${measure} (%)`, nice: true },
      color: { domain: roles, range: roles.map((role) => `var(--c-${role})`) },
      symbol: { domain: roles, range: roles.map((role) => ROLES[role]), legend: true },
      marks: [
        Plot.ruleX(lines.filter(([name]) => name === "clean"), { x: (item) => 100 * item[1], ...rule }),
        Plot.ruleY(lines.filter(([name]) => name === measure), { y: (item) => 100 * item[1], ...rule }),
        Plot.line(frontOf(points, measure), { x, y, curve: "step-after", stroke: "var(--soft)", strokeWidth: 1.2 }),
        data.dials.map((dial) => Plot.line(dial.rows.map((i) => rows[i]).filter((row) => points.includes(row)), { x, y, stroke: "var(--c-dial)" })),
        Plot.link(withBars, { x1: end("clean", 1), x2: end("clean", 2), y1: y, y2: y, ...bars }),
        Plot.link(withBars, { x1: x, x2: x, y1: end(measure, 1), y2: end(measure, 2), ...bars }),
        [points.filter(isSoup), points.filter((row) => !isSoup(row))].map((part) => Plot.dot(part, {
          x, y, symbol: "role", fill: "role", r: isSoup(part[0] ?? {}) ? 4.5 : 7, stroke: "var(--paper)", strokeWidth: 0.8,
          fillOpacity: (row) => (row.screened && state.split === data.selectOn ? 0.35 : 1), className: "points",
        })),
        Plot.text(points.filter((row) => row.role === "ingredient"), { x, y, text: "name", dy: -13, fill: "var(--ink)", stroke: "var(--paper)", strokeWidth: 4 }),
        marksOfInterest(points, x, y),
        Plot.tip(points, Plot.pointer({ x, y, title: tipOf, maxRadius: 30, stroke: "var(--soft)" })),
      ],
    });
    const goal = state.choice ? `; the rule takes ${state.choice.name}` : "";
    const copies = points.filter((row) => points.some((other) => other.name === row.equals)).length;
    const counted = `${points.length - copies} networks`;
    mount(place, plot, `${counted} by clean accuracy and ${measure} on ${state.split}${goal}. The table of all networks holds the numbers.`);
    selectByPointer(plot, points, x, y);
    moveByKeys(place, [...points].sort((a, b) => x(a) - x(b)));
    byId("front-caption").textContent =
      `${counted} on ${state.split}. Grey steps: the front. Bars: 95 % intervals. Outer ring: the soup that the rule takes`
      + ` on ${data.selectOn}; inner ring: the selected network. Dashed: the requirement.`
      + (points.some((row) => row.screened) ? " Pale: upper bounds, or estimates from a part of the samples." : "");
  }

  // Ternary maps: the corners of a triangle are the ingredients, in Cartesian coordinates.

  const HEIGHT = Math.sqrt(3) / 2;
  const TOP = HEIGHT + 0.01; // the triangles beside the map hide what contours extrapolate
  const cornerX = (shares) => shares[0] / 2 + shares[2];
  const cornerY = (shares) => shares[0] * HEIGHT;

  // Contours just below round values, so that a plateau at one is not speckled; the first one fills the minimum.
  function levelsOf(low, high) {
    return [low, ...d3.ticks(low, high, 12).filter((value) => value > low)].map((value) => value - 1e-6);
  }

  function drawTernary(ternary, measure) {
    const members = ternary.rows.map((index) => rows[index]);
    const points = members.filter(has(measure));
    const surface = state.split === data.selectOn ? ternary.surfaces[measure] : undefined;
    const unattacked = (surface ?? []).filter((item) => !item.attacked);
    const filled = surface ?? points.map((row) => ({ shares: row.shares, value: share(row, measure) }));
    const x = (row) => cornerX(row.shares);
    const y = (row) => cornerY(row.shares);
    const value = (item) => 100 * item.value;
    const outside = { fill: "var(--paper)", stroke: "none" };
    const edge = [[0, 0], [0.5, HEIGHT], [1, 0], [0, 0]];
    const names = ternary.ingredients.map((text, i) => ({ text, x: [0.5, 0, 1][i], y: [HEIGHT, 0, 0][i] }));
    const label = (anchor, chosen, dy) => Plot.text(chosen, { x: "x", y: "y", text: "text", textAnchor: anchor, dy, fill: "var(--ink)" });
    const place = make("div");
    const width = Math.min(420, Math.max(260, (byId("ternary").clientWidth - 32) / Math.max(1, Math.min(3, data.measures.length))));
    const margin = 30;
    const flat = d3.min(filled, value) === d3.max(filled, value);
    const plot = Plot.plot({
      width, height: (width - 2 * margin) * HEIGHT + 2 * margin, margin,
      x: { domain: [0, 1], axis: null }, y: { domain: [0, HEIGHT], axis: null },
      color: { scheme: "viridis", legend: true, label: `${measure} on ${state.split} (%)`, width: width - 2 * margin, marginLeft: 10, ticks: 4 },
      marks: [
        flat || filled.length < 3 ? null : Plot.contour(filled, {
          x: (item) => cornerX(item.shares), y: (item) => cornerY(item.shares), fill: value, interpolate: "barycentric",
          thresholds: levelsOf(...d3.extent(filled, value)), stroke: "white", strokeOpacity: 0.5, x1: 0, x2: 1, y1: 0, y2: HEIGHT,
        }),
        Plot.line([[-0.01, 0], [-0.01, TOP], [0.5, TOP], [0.5, HEIGHT], [0, 0]], outside),
        Plot.line([[1.01, 0], [1.01, TOP], [0.5, TOP], [0.5, HEIGHT], [1, 0]], outside),
        Plot.line(edge, { stroke: "var(--soft)" }),
        Plot.dot(members, {
          x, y, r: 4.5, fill: (row) => (has(measure)(row) ? 100 * share(row, measure) : "none"),
          stroke: (row) => (has(measure)(row) ? "white" : "var(--soft)"), strokeWidth: 1.2, className: "points",
        }),
        Plot.dot(unattacked, {
          x: (item) => cornerX(item.shares), y: (item) => cornerY(item.shares), r: 3, fill: "none", stroke: "white", strokeOpacity: 0.8,
          title: (item) => `${item.name}\npredicted: ${describe([item.value, item.low, item.high])}`, className: "predicted",
        }),
        label("middle", [names[0]], -14), label("start", [names[1]], 16), label("end", [names[2]], 16),
        marksOfInterest(members, x, y),
        Plot.tip(members, Plot.pointer({ x, y, title: tipOf, maxRadius: 30, stroke: "var(--soft)" })),
      ],
    });
    mount(place, plot, `${measure} of ${points.length} mixtures of ${ternary.ingredients.join(", ")}. The table of all networks holds the numbers.`);
    selectByPointer(plot, members, x, y);
    const panel = make("div");
    panel.append(make("h3", data.ternaries.length > 1 ? `${ternary.section}: ${measure}` : measure), place);
    return panel;
  }

  function drawTernaries() {
    byId("ternary-section").hidden = !data.ternaries.length;
    if (!data.ternaries.length) return;
    const panels = data.ternaries.flatMap((ternary) => data.measures.map((measure) => drawTernary(ternary, measure)));
    byId("ternary").replaceChildren(...panels);
    const members = data.ternaries.flatMap((ternary) => ternary.rows.map((index) => rows[index]));
    const modelled = state.split === data.selectOn && data.ternaries.some((ternary) => Object.keys(ternary.surfaces).length);
    byId("ternary-caption").textContent =
      `Dots: ${members.length} soups; a dot without colour was not measured. `
      + (modelled
        ? "The colours show the surrogate's surface; small dots are soups that it predicted and nobody attacked."
        : "Colours between them are interpolated.");
    moveByKeys(byId("ternary"), members);
  }

  // Coefficients of the selected soup, by layer where they differ.

  function sharesOf(row) {
    const layered = data.layers.find((item) => item.row === row?.index);
    if (layered) return layered;
    if (!row?.shares.length) return null;
    return { ingredients: row.ingredients, layers: ["whole network"], shares: [row.shares] };
  }

  function drawCoefficients() {
    const place = byId("coefficients");
    const row = state.selected;
    const found = sharesOf(row);
    byId("soup").value = found ? String(row.index) : "";
    for (const dial of dials) dial.follow(row);
    if (!found) {
      place.replaceChildren();
      const why = row?.table ? `are not drawn here; see ${row.table}`
        : row?.candidate ? "are not on record" : "do not exist: it is no soup";
      byId("coefficients-caption").textContent = row ? `The coefficients of ${row.name} ${why}. Choose a soup above.` : "";
      return;
    }
    const cells = found.layers.flatMap((layer, i) =>
      found.ingredients.map((name, k) => ({ place: i, layer, name, share: found.shares[i][k] })));
    const width = widthOf(place);
    const colours = found.ingredients.length <= SHARES.length
      ? { domain: found.ingredients, range: SHARES, legend: true } : { domain: found.ingredients, scheme: "turbo", legend: true };
    const short = (i) => { const name = found.layers[i]; return name.length > 30 ? `…${name.slice(-29)}` : name; };
    const plot = Plot.plot({
      width, marginLeft: Math.min(215, width * 0.45), marginRight: 20,
      height: 70 + found.layers.length * (found.layers.length > 1 ? 16 : 34),
      marginBottom: 40, x: { label: "share →", domain: d3.min(cells, (cell) => cell.share) < 0 ? undefined : [0, 1], grid: true },
      y: { label: null, domain: d3.range(found.layers.length), tickFormat: short, tickSize: 0 }, color: colours,
      marks: [
        Plot.barX(cells, { x: "share", y: "place", fill: "name", insetTop: 1, title: (cell) => `${cell.layer}\n${cell.name}: ${cell.share.toFixed(3)}`, tip: true }),
        Plot.ruleX([0], { stroke: "var(--soft)" }),
      ],
    });
    mount(place, plot, `Shares of ${found.ingredients.join(", ")} in ${row.name}. A table with the numbers follows for coefficients by layer.`);
    byId("coefficients-caption").textContent =
      `Share of each ingredient in ${found.layers.length > 1 ? `the ${found.layers.length} layers` : "all layers"} of ${row.name}: ${row.what}.`;
  }

  function makeDial(dial) {
    const members = dial.rows.map((index) => rows[index]);
    const label = make("label", `${dial.section}: t `);
    const input = make("input", undefined, { type: "range", min: 0, max: members.length - 1, step: 1 });
    const output = make("output");
    label.append(input, output);
    const show = (row) => {
      output.textContent = row.at.toString();
      input.setAttribute("aria-valuetext", `t = ${row.at}, from 0 (robust) to 1 (clean)`);
    };
    input.addEventListener("input", () => select(members[input.value]));
    input.value = "0";
    show(members[0]);
    byId("dials").append(label);
    return {
      follow(row) {
        const at = members.indexOf(row);
        if (at >= 0) { input.value = String(at); show(row); }
      },
    };
  }

  const dials = data.dials.map(makeDial);

  // Paired differences of the selected soup, or of the chosen one.

  function drawDifferences() {
    const place = byId("differences");
    if (!place) return;
    const row = [state.selected, state.choice].find((item) => item && data.differences[item.name])
      ?? rows.find((item) => data.differences[item.name]);
    const items = data.differences[row.name];
    const splits = [...new Set(items.map((item) => item.split))];
    const split = splits.includes(state.split) ? state.split : splits[0];
    const points = items.filter((item) => item.split === split);
    const width = widthOf(place);
    const measures = data.measures.filter((measure) => points.some((item) => item.measure === measure));
    const ingredients = [...new Set(points.map((item) => item.ingredient))];
    const text = (item) => `${d3.format("+.1f")(100 * item.value)} [${d3.format("+.1f")(100 * item.low)}, ${d3.format("+.1f")(100 * item.high)}]`;
    const plot = Plot.plot({
      width, marginLeft: Math.min(170, width * 0.3), marginRight: 16, marginTop: 26,
      height: 66 + measures.length * (28 + 36 * ingredients.length),
      marginBottom: 40, x: { label: "points of accuracy: soup less ingredient →", grid: true, insetLeft: 50, insetRight: 50 },
      y: { label: null, domain: ingredients, tickSize: 0, tickFormat: (name) => (name.length > 20 ? `${name.slice(0, 19)}…` : name) },
      fy: { label: null, domain: measures, axis: null },
      marks: [
        Plot.text(measures, { fy: (name) => name, text: (name) => name, frameAnchor: "top-left", dy: -16, fontWeight: 600, fill: "var(--ink)" }),
        Plot.ruleX([0], { stroke: "var(--ink)" }),
        Plot.link(points, { x1: (d) => 100 * d.low, x2: (d) => 100 * d.high, y1: "ingredient", y2: "ingredient", fy: "measure", stroke: "var(--c-ingredient)", strokeWidth: 2 }),
        Plot.dot(points, { x: (d) => 100 * d.value, y: "ingredient", fy: "measure", r: 5, fill: "var(--c-ingredient)", title: (d) => `${d.measure}, less ${d.ingredient}\n${text(d)} points on ${d.n} ${d.split} samples`, tip: true }),
        Plot.text(points, { x: (d) => 100 * d.value, y: "ingredient", fy: "measure", text, dy: -11, fill: "var(--ink)", stroke: "var(--paper)", strokeWidth: 4 }),
      ],
    });
    place.dataset.name = row.name;
    mount(place, plot, `Accuracy of ${row.name} less that of its ingredients, in points, on ${split}. A table holds the numbers of the chosen soup.`);
    byId("differences-caption").textContent =
      `${row.name} less each ingredient on the same ${points[0]?.n ?? 0} samples of ${split}; bars: the 95 % interval of each pair alone (Tango). The intervals of the answer are wider: they hold for all candidates and ingredients of the search at once.`;
  }

  // Lines between two networks, and planes of loss values.

  function panelOf(title) {
    const panel = make("div");
    const place = make("div");
    panel.append(make("h3", title), place);
    return [panel, place];
  }

  function drawLines() {
    byId("lines-section").hidden = !data.lines.length;
    byId("lines").replaceChildren(...data.lines.map((line) => {
      const members = line.rows.map((index) => rows[index]);
      const [panel, place] = panelOf(`${line.section}: ${line.ingredients.join(" to ")}`);
      const points = data.measures.flatMap((measure) => members.filter(has(measure)).map((row) => ({ row, measure })));
      const x = (d) => d.row.shares[1];
      const y = (d) => 100 * share(d.row, d.measure);
      const plot = Plot.plot({
        width: 360, height: 260, marginBottom: 42, inset: 6, grid: true, x: { label: `weight of ${line.ingredients[1]} →` }, y: { label: "↑ accuracy (%)", nice: true },
        color: { domain: data.measures, range: SHARES, legend: true },
        marks: [
          Plot.line(points, { x, y, stroke: "measure" }),
          Plot.dot(points, { x, y, fill: "measure", r: 4 }),
          Plot.dot(points.filter((d) => d.row === state.selected), { x, y, r: 7.5, stroke: "var(--ink)", strokeWidth: 2.5, className: "ring-selected" }),
          Plot.tip(points, Plot.pointer({ x, y, title: (d) => tipOf(d.row), maxRadius: 30, stroke: "var(--soft)" })),
        ],
      });
      mount(place, plot, `Accuracy along the line from ${line.ingredients.join(" to ")}.`);
      return panel;
    }));
  }

  function drawPlanes() {
    byId("planes-section").hidden = !data.planes.length;
    byId("planes").replaceChildren(...data.planes.map((plane) => {
      const [panel, place] = panelOf(plane.name);
      const corners = plane.corners.map(([x, y], k) => ({ x, y, name: plane.checkpoints[k] }));
      const finite = plane.loss.filter((value) => value !== null).sort(d3.ascending);
      const domain = [finite[0], d3.quantileSorted(finite, 0.85)]; // without the steep edges
      const plot = Plot.plot({
        width: 360, height: 320, margin: 34, marginLeft: 40, x: { domain: plane.x, label: "distance in weights" }, y: { domain: plane.y, label: null },
        color: { scheme: "viridis", reverse: true, legend: true, width: 300, label: "robust loss (nats)", domain, clamp: true },
        marks: [
          Plot.contour(plane.loss.map((value) => value ?? Number.NaN), {
            width: plane.columns, height: plane.rows, x1: plane.x[0], x2: plane.x[1], y1: plane.y[0], y2: plane.y[1],
            fill: Plot.identity, stroke: "white", strokeOpacity: 0.4, thresholds: levelsOf(...domain), className: "levels",
          }),
          Plot.dot(corners, { x: "x", y: "y", r: 5, fill: "white", stroke: "black" }),
          Plot.text(corners, { x: "x", y: "y", text: "name", dy: -12, fill: "black", stroke: "white", strokeWidth: 4 }),
        ],
      });
      mount(place, plot, `Robust loss on the plane through ${plane.checkpoints.join(", ")}.`);
      panel.append(make("p", plane.settings, { class: "soft" }));
      return panel;
    }));
  }

  // The table.

  function markTable() {
    for (const line of document.querySelectorAll("#networks tbody tr")) {
      const row = rows[line.dataset.row];
      line.classList.toggle("selected", row === state.selected);
      line.classList.toggle("choice", row === state.choice);
      if (row === state.selected) line.setAttribute("aria-current", "true");
      else line.removeAttribute("aria-current");
    }
  }

  function cellKey(line, column) {
    const cell = line.cells[column];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  }

  function compareCells(a, b) {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? 1 : -1; // a dash is below any number
    return a.localeCompare(b, "en", { numeric: true });
  }

  function sortTable(column) {
    const table = byId("networks");
    const heads = [...table.tHead.rows[0].cells];
    const isNumber = column > 2;
    const before = heads[column].getAttribute("aria-sort");
    const descending = before ? before === "ascending" : isNumber;
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
    const lines = [...table.tBodies[0].rows];
    lines.sort((a, b) => (descending ? -1 : 1) * compareCells(cellKey(a, column), cellKey(b, column)));
    table.tBodies[0].append(...lines);
  }

  function wrapInButton(cell, onClick) {
    const button = make("button", undefined, { type: "button" });
    button.append(...cell.childNodes);
    cell.append(button);
    button.addEventListener("click", onClick);
  }

  function prepareTable() {
    const table = byId("networks");
    [...table.tHead.rows[0].cells].forEach((head, column) => wrapInButton(head, () => sortTable(column)));
    for (const line of table.tBodies[0].rows) {
      const row = rows[line.dataset.row];
      wrapInButton(line.cells[0], () => select(row));
      line.addEventListener("click", () => select(row));
    }
  }

  // Selection, controls and the first drawing.

  function moveByKeys(place, ordered) {
    place.onkeydown = (event) => {
      const at = ordered.indexOf(state.selected);
      const next = {
        ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: Math.max(at, 0) - 1, ArrowDown: Math.max(at, 0) - 1,
        Home: 0, End: ordered.length - 1,
      }[event.key];
      if (next === undefined || event.target !== place || !ordered.length) return;
      event.preventDefault();
      select(ordered[Math.min(Math.max(next, 0), ordered.length - 1)]);
    };
  }

  function select(row) {
    if (!row || row === state.selected) return;
    state.selected = row;
    drawAll();
  }

  function drawAll() {
    showChoice();
    showCard();
    drawFront();
    drawTernaries();
    drawCoefficients();
    drawDifferences();
    drawLines();
    markTable();
  }

  function setThreshold(value) {
    const before = state.choice;
    state.threshold = value;
    showChoice();
    if (state.choice !== before) state.selected = state.choice;
    drawAll();
  }

  function resetGoal() {
    const required = Object.keys(data.rule.require)[0] ?? "clean";
    state.required = byId("required").value = required;
    state.maximise = byId("maximise").value = data.rule.maximise;
    state.threshold = data.rule.require[required] ?? 0;
    byId("threshold").value = String(100 * state.threshold);
    state.choice = null;
    setThreshold(state.threshold);
  }

  function prepareControls() {
    const options = (values) => values.map((value) => [value, value]);
    fillSelect("split", options(data.splits), state.split, (value) => { state.split = value; drawAll(); });
    fillSelect("measure", options(robust), state.measure, (value) => { state.measure = value; drawAll(); });
    fillSelect("maximise", options(Object.keys(data.rule.goals)), state.maximise, (value) => { state.maximise = value; setThreshold(state.threshold); });
    fillSelect("required", options(data.measures), state.required, (value) => {
      state.required = value;
      byId("threshold").value = String(100 * (data.rule.require[value] ?? 0));
      setThreshold(data.rule.require[value] ?? 0);
    });
    const soups = rows.filter((row) => sharesOf(row));
    byId("coefficients-section").hidden = !soups.length;
    fillSelect("soup", [["", "none"], ...soups.map((row) => [String(row.index), row.name])], "", (value) => select(rows[value]));
    byId("threshold").addEventListener("input", (event) => setThreshold(Number(event.target.value) / 100));
    byId("reset").addEventListener("click", resetGoal);
    byId("theme").addEventListener("change", (event) => { document.documentElement.dataset.theme = event.target.value; });
  }

  document.documentElement.classList.add("scripted");
  prepareTable();
  prepareControls();
  resetGoal();
  drawPlanes();
  let width = document.body.clientWidth;
  new ResizeObserver(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    drawAll();
  }).observe(document.body);
})();
