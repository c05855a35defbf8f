// What moves on a desk page: all of it is read from the page, nothing is computed but orders and ranks.
(() => {
  const desk = JSON.parse(document.getElementById("desk-data").textContent);
  const at = id => document.getElementById(id);
  const bytes = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0)).buffer;
  const { layers, heads, lengths } = desk;
  for (const stop of desk.stops) stop.codes = new Uint16Array(bytes(stop.codes));
  for (const source of desk.influence) source.values = new Float32Array(bytes(source.values));

  // Plans of the front lie close together in density: the slider leaves them out where it has others.
  const budget = desk.stops.some(stop => stop.kind === "budget");
  const slid = [...desk.stops.keys()].filter(index => !budget || desk.stops[index].kind !== "front");
  const state = {
    stop: desk.first, length: desk.first_length, order: "number", task: 0, layer: 0, head: 0, hovered: null, curve: 0,
  };
  // By density at the length that is shown: plans that grow differently have another order at another length.
  const byDensity = indices => indices.sort((a, b) => desk.stops[a].density[state.length] - desk.stops[b].density[state.length] || a - b);
  const stop = () => desk.stops[state.stop];
  const cell = (layer, head) => layer * heads + head;
  const span = (plan, layer, head) => desk.spans[plan.codes[cell(layer, head)]][state.length];
  const influence = (layer, head, source = desk.influence[state.task]) => source.values[cell(layer, head)];
  const shownHead = () => state.hovered ?? state;

  // By layer: the heads from the first row to the last.
  const order = () => {
    const value = { span: (layer, head) => span(stop(), layer, head), influence }[state.order];
    return Array.from({ length: layers }, (_, layer) => {
      const rows = [...Array(heads).keys()];
      return value ? rows.sort((a, b) => value(layer, b) - value(layer, a) || a - b) : rows;
    });
  };
  let rows = order();

  const drawn = new Set();
  let waiting = 0;
  const redraw = (...names) => {
    names.forEach(name => drawn.add(name));
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      for (const name of drawn) if (document.documentElement.dataset.drawn) moaPage.draw(moaPage.named(name));
      drawn.clear();
    });
  };

  const grid = value => Array.from({ length: heads }, (_, row) => rows.map((order, layer) => value(layer, order[row])));
  const fillMap = (name, value, most) => {
    const plot = moaPage.named(name);
    if (!plot) return;
    const [heat] = plot.data;
    Object.assign(heat, { z: grid(value), customdata: grid((layer, head) => [layer, head]), zmin: 0, zmax: most });
    const words = { number: "KV head", span: "KV heads, longest span first", influence: "KV heads, most influence first" };
    plot.layout.yaxis.title = { text: words[state.order] };
    ringOn(plot);
  };
  const ringOn = plot => {
    const { layer, head } = shownHead();
    Object.assign(plot.data[1], { x: [layer], y: [rows[layer].indexOf(head)] });
  };
  const fillMaps = () => {
    rows = order();
    fillMap("spans", (layer, head) => span(stop(), layer, head), lengths[state.length]);
    if (desk.influence.length) fillMap("influence", (layer, head) => influence(layer, head), Math.max(...desk.influence[state.task].values));
    redraw(...["spans", "influence"].filter(moaPage.named));
  };

  const fillList = (list, pairs) => list.replaceChildren(...pairs.flatMap(([name, value]) => {
    const [term, text] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, text.textContent] = [name, value];
    return [term, text];
  }));
  const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}%`;
  const number = value => value.toLocaleString("en");
  const fillFacts = () => {
    const { length } = state, plan = stop(), dense = desk.stops.at(-1);
    const [spans, whole] = [plan, dense].map(({ codes }) => Array.from(codes, code => desk.spans[code][length]));
    const mean = spans.reduce((sum, each) => sum + each, 0) / spans.length;
    const told = plan.measured.length ? plan.measured : [nearest(plan)].filter(Boolean);
    const named = plan.kind === "budget" ? "" : ` (${plan.name})`;
    at("plan").textContent = `${percent(plan.density[length])} of the KV cache${named}`;
    fillList(at("facts"), [
      ["plan", plan.name],
      ["density", `${percent(plan.density[length])} at ${number(lengths[length])} tokens`],
      ["KV bytes, predicted", `${plan.kv_bytes[length]} (dense ${dense.kv_bytes[length]})`],
      ["mean span", `${number(Math.round(mean))} tokens; ${spans.filter((each, at) => each >= whole[at]).length} of ${spans.length} keep all`],
      ...Object.entries(plan.predicted).filter(([name]) => !name.includes("@")).map(([name, value]) =>
        [`predicted loss, ${name}`, value.toFixed(4)]),
      ...told.map(({ what, said }) => [`measured: ${what}`, said]),
      ["identity", plan.identity],
    ]);
  };
  const nearest = plan => {
    const measured = desk.stops.filter(other => other.measured.length);
    if (!measured.length) return null;
    const away = other => Math.abs(other.density[state.length] - plan.density[state.length]);
    const best = measured.reduce((a, b) => away(b) < away(a) ? b : a);
    return { what: "not this plan", said: `nearest in density: ${best.name}, ${percent(best.density[state.length])}; ${best.measured[0].what}: ${best.measured[0].said}` };
  };

  const fillHead = () => {
    const { layer, head } = shownHead(), now = span(stop(), layer, head);
    at("head-name").textContent = `Layer ${layer}, KV head ${head}`;
    const standing = source => {
      const own = influence(layer, head, source);
      return `${own.toPrecision(3)} nats, rank ${source.values.filter(value => value > own).length + 1} of ${source.values.length}`;
    };
    fillList(at("head-facts"), [
      ["span", `${number(now)} of ${number(lengths[state.length])} tokens`],
      ...desk.influence.map(source => [`${source.task}, ${number(source.length)} tokens`, standing(source)]),
    ]);
    const curve = moaPage.named("head");
    const alone = plan => budget ? plan.kind === "budget" || plan.kind === "dense" : true;
    const plans = byDensity([...desk.stops.keys()]).map(index => desk.stops[index]).filter(alone);
    Object.assign(curve.data[0], {
      x: plans.map(plan => 100 * plan.density[state.length]), y: plans.map(plan => span(plan, layer, head)),
    });
    mark(curve, state.length);
    redraw("head");
  };

  const mark = (plot, length) => {
    const x = 100 * stop().density[length];
    plot.layout.shapes = [{ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: { color: "#ff5c39", width: 2, dash: "dot" } }];
  };
  const fillCurves = () => {
    const loss = moaPage.named("loss"), measured = moaPage.named("measured");
    if (loss) mark(loss, desk.main_length);
    if (measured) {
      const chosen = desk.curves[state.curve];
      measured.data = chosen.data;
      Object.assign(measured.layout, chosen.axes);
      mark(measured, Math.max(0, lengths.indexOf(chosen.length)));
    }
    redraw(...["loss", "measured"].filter(moaPage.named));
  };

  const goal = (plan, name) => name === "density" ? plan.density[desk.main_length] : plan.predicted[name];
  const fillFront = () => {
    const plot = moaPage.named("front");
    if (!plot) return;
    const [x, y] = [at("front-x").value, at("front-y").value];
    const place = plan => [goal(plan, x), goal(plan, y)];
    const points = [];
    for (const trace of plot.data) {
      if (!trace.customdata) continue;
      const found = trace.customdata.map(name => place(desk.stops[desk.front[name]]));
      [trace.x, trace.y] = [found.map(each => each[0]), found.map(each => each[1])];
      points.push(...found);
    }
    const line = plot.data.find(trace => trace.mode === "lines");
    if (line) {
      let best = Infinity;
      const corners = points.sort((a, b) => a[0] - b[0] || a[1] - b[1]).filter(([, up]) => up < best && ((best = up), true));
      [line.x, line.y] = [corners.map(each => each[0]), corners.map(each => each[1])];
    }
    const ring = plot.data.at(-1), own = place(stop());
    [ring.x, ring.y] = own.includes(undefined) ? [[], []] : [[own[0]], [own[1]]];
    const axis = name => ({ title: { text: name === "density" ? `density at ${number(lengths[desk.main_length])} tokens` : `predicted loss: ${name}` },
      tickformat: name === "density" ? ".0%" : "~g" });
    Object.assign(plot.layout, { xaxis: axis(x), yaxis: axis(y) });
    redraw("front");
  };

  const choosePlan = index => {
    state.stop = index;
    const own = stop().density[state.length];
    const place = byDensity(slid).indexOf(index);
    const away = other => Math.abs(desk.stops[slid[other]].density[state.length] - own);
    at("density").value = place >= 0 ? place : [...slid.keys()].reduce((a, b) => away(b) < away(a) ? b : a);
    at("density").setAttribute("aria-valuetext", `${stop().name}, ${percent(own)}`);
    fillMaps(); fillFacts(); fillHead(); fillCurves(); fillFront();
  };
  const showHead = () => {
    for (const name of ["spans", "influence"]) {
      const plot = moaPage.named(name);
      if (!plot) continue;
      ringOn(plot);
      if (plot.box.data) Plotly.restyle(plot.box, { x: [plot.data[1].x], y: [plot.data[1].y] }, [1]);
    }
    fillHead();
  };
  const chooseHead = (layer, head) => {
    Object.assign(state, { layer, head, hovered: null });
    at("head").value = `L${layer} H${head}`;
    at("head-error").textContent = "";
    showHead();
  };

  const asked = text => {
    const found = /^\s*(?:L|layer)?\s*(\d+)[\s,.:;]*(?:H|head|KV head)?\s*(\d+)\s*$/i.exec(text);
    const [layer, head] = found ? [Number(found[1]), Number(found[2])] : [NaN, NaN];
    return layer < layers && head < heads ? [layer, head] : null;
  };

  const listen = () => {
    at("density").max = slid.length - 1;
    at("density").addEventListener("input", event => choosePlan(slid[event.target.value]));
    at("length").addEventListener("change", event => { state.length = Number(event.target.value); choosePlan(state.stop); });
    at("order").addEventListener("change", event => { state.order = event.target.value; fillMaps(); });
    at("task")?.addEventListener("change", event => { state.task = Number(event.target.value); fillMaps(); });
    at("curve")?.addEventListener("change", event => { state.curve = Number(event.target.value); fillCurves(); });
    for (const id of ["front-x", "front-y"]) at(id)?.addEventListener("change", fillFront);
    at("head").addEventListener("change", event => {
      const found = asked(event.target.value);
      if (found) chooseHead(...found);
      else at("head-error").textContent = `a head is written L12 H3: layers 0 to ${layers - 1}, KV heads 0 to ${heads - 1}`;
    });
    document.addEventListener("keydown", event => {
      if (/^(INPUT|SELECT|BUTTON|SUMMARY)$/.test(document.activeElement?.tagName ?? "") || event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === " " && state.hovered) {
        event.preventDefault();
        chooseHead(state.hovered.layer, state.hovered.head);
      }
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!step) return;
      event.preventDefault();
      const layer = Math.min(Math.max(state.layer + step[0], 0), layers - 1);
      // Up and down follow the rows as they are ordered; a step aside stays in its row.
      const row = Math.min(Math.max(rows[state.layer].indexOf(state.head) + step[1], 0), heads - 1);
      chooseHead(layer, rows[layer][row]);
    });
  };
  // What plotly tells of its figures, once they are drawn.
  const listenToFigures = () => {
    for (const name of ["spans", "influence"]) {
      const plot = moaPage.named(name);
      if (!plot) continue;
      const place = event => event.points.find(point => point.curveNumber === 0)?.customdata;
      plot.box.on("plotly_click", event => { const found = place(event); if (found) chooseHead(...found); });
      plot.box.on("plotly_hover", event => {
        const found = place(event);
        if (!found) return;
        state.hovered = { layer: found[0], head: found[1] };
        showHead();
      });
      plot.box.on("plotly_unhover", () => { state.hovered = null; showHead(); });
    }
    moaPage.named("front")?.box.on("plotly_click", event => {
      const index = desk.front[event.points[0].customdata];
      if (index !== undefined) choosePlan(index);
    });
  };

  const chip = (text, tip, classes, act) => {
    const made = document.createElement("button");
    Object.assign(made, { type: "button", textContent: text, title: tip, className: ["moa-chip", ...classes].join(" "), onclick: act });
    return made;
  };
  const select = (box, index) => [...box.children].forEach((each, other) => each.classList.toggle("selected", other === index));
  const showTrace = () => {
    const box = at("trace-tokens"), list = at("trace-heads");
    const look = index => {
      const token = desk.trace.tokens[index];
      select(box, index);
      at("trace-why").textContent = token.why || "nobody looked at this token before the page was made";
      const read = place => {
        select(list, place);
        at("trace-text").innerHTML = token.heads[place]?.html ?? "";
        if (token.heads[place]) chooseHead(token.heads[place].layer, token.heads[place].kv_head);
      };
      list.replaceChildren(...token.heads.map((head, place) => chip(head.label, `layer ${head.layer}, KV head ${head.kv_head}`, [], () => read(place))));
      read(0);
    };
    box.replaceChildren(...desk.trace.tokens.map(({ text, tip, classes }, index) => chip(text, tip, classes, () => look(index))));
    look(Math.max(0, desk.trace.tokens.findIndex(token => token.why)));
  };

  at("length").value = state.length;
  if (at("front-y")) at("front-y").selectedIndex = 1;
  listen();
  if (desk.influence.length) {
    const values = desk.influence[0].values, most = values.indexOf(Math.max(...values));
    Object.assign(state, { layer: Math.floor(most / heads), head: most % heads });
  }
  choosePlan(state.stop);
  chooseHead(state.layer, state.head);
  if (desk.trace) showTrace();
  moaPage.drawn.then(listenToFigures);
})();
