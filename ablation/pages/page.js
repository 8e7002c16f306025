"use strict";
(() => {
  const root = document.documentElement;
  const tip = document.getElementById("tip");
  const element = (name, attributes = {}, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };

  // Theme: the system's, until the button chooses one
  const button = document.getElementById("theme");
  const isDark = () => getComputedStyle(root).colorScheme === "dark" ||
    (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  const named = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; named(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", named);
  named();
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));

  // Exact values, by mouse, finger or keyboard
  const place = (x, y) => {
    tip.hidden = false;
    const width = tip.offsetWidth, height = tip.offsetHeight;
    const left = Math.min(Math.max(x + 14, 8), root.clientWidth - width - 8);
    const above = y - height - 12;
    tip.style.left = `${Math.max(left, 8) + scrollX}px`;
    tip.style.top = `${(above < 4 ? y + 18 : above) + scrollY}px`;
  };
  const show = (target) => {
    const box = target.getBoundingClientRect();
    tip.textContent = target.dataset.tip;
    place(box.left + box.width / 2, box.top);
  };
  const hide = () => { tip.hidden = true; };
  for (const target of document.querySelectorAll("[data-tip]")) {
    target.addEventListener("pointerenter", () => show(target));
    target.addEventListener("pointerdown", () => show(target));
    target.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
    target.addEventListener("focus", () => show(target));
    target.addEventListener("blur", hide);
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest("[data-tip], .frame")) hide(); });

  // Loss curves: the data has ranges and ticks for every choice; here they only get their places
  const figure = document.getElementById("curves");
  if (!figure) return;
  const data = JSON.parse(document.getElementById("curve-data").textContent);
  const choice = data.choice;
  const frame = figure.querySelector(".frame");
  const inner = frame.querySelector(".lines");
  const groups = [...inner.children];
  const marks = [...frame.children].filter((child) => child.dataset.series !== undefined);
  const shapes = groups.map((group) => group.querySelector(".stroke").getAttribute("class").split(" ")[1]);
  const symbols = [...figure.querySelectorAll(".legend use")].map((use) => use.getAttribute("href"));
  const cursor = frame.querySelector(".cursor");
  const controls = figure.querySelector(".controls");
  const reading = figure.querySelector(".reading");
  const outputs = [...figure.querySelectorAll(".legend output")];
  const hidden = new Set();
  controls.hidden = false;

  const axes = () => {
    const reach = choice.xscale === "log" ? "all" : "late";
    return [data.x[choice.source][choice.x][choice.xscale],
      data.y[choice.source][choice.y][`${reach}-${choice.yscale}`]];
  };
  const share = (axis, value) => axis.log
    ? Math.log(Math.max(value, 1e-300) / axis.low) / Math.log(axis.high / axis.low)
    : (value - axis.low) / (axis.high - axis.low);
  const percent = (value) => `${(100 * value).toFixed(3)}%`;
  const path = (xs, ys, [ax, ay]) => {
    let pen = "M", d = "";
    xs.forEach((x, i) => {
      if (ys[i] === null || ys[i] === undefined) { pen = "M"; return; }
      d += `${pen}${(1000 * share(ax, x)).toFixed(1)},${(1000 * (1 - share(ay, ys[i]))).toFixed(1)}`;
      pen = "L";
    });
    return d;
  };
  const band = (xs, low, high, both) => {
    const known = xs.map((_, i) => i).filter((i) => low[i] !== null);
    const back = [...known].reverse();
    return path([...known, ...back].map((i) => xs[i]),
      [...known.map((i) => high[i]), ...back.map((i) => low[i])], both);
  };

  const drawTicks = (which, axis) => {
    const group = frame.querySelector(`.ticks.${which}`);
    group.replaceChildren(...axis.ticks.flatMap(([value, text]) => {
      const at = percent(which === "x" ? share(axis, value) : 1 - share(axis, value));
      return which === "x"
        ? [element("line", { x1: at, x2: at, y1: 0, y2: "100%" }),
          element("text", { x: at, y: "100%", dy: 18, "text-anchor": "middle" }, text)]
        : [element("line", { x1: 0, x2: "100%", y1: at, y2: at }),
          element("text", { x: 0, y: at, dx: -8, dy: "0.34em", "text-anchor": "end" }, text)];
    }));
    figure.querySelector(`.axis-label.${which}`).textContent = axis.label;
  };
  const drawSeries = (i, both) => {
    const found = data.series[i][choice.source];
    const xs = found.x[choice.x] || [], ys = found.mean[choice.y] || [];
    const dash = groups[i].querySelector(".stroke").getAttribute("stroke-dasharray");
    const paths = [];
    if (found.low && found.low[choice.y])
      paths.push(element("path", { class: `band ${shapes[i]}`, d: band(xs, found.low[choice.y], found.high[choice.y], both) }));
    for (const seed of found.seeds)
      paths.push(element("path", { class: `seed ${shapes[i]}`, d: path(seed.x[choice.x], seed.y[choice.y] || [], both) }));
    paths.push(element("path", { class: `stroke ${shapes[i]}`, d: path(xs, ys, both), ...(dash ? { "stroke-dasharray": dash } : {}) }));
    groups[i].replaceChildren(...paths);
    const points = choice.source === "val" ? xs.map((x, k) => [share(both[0], x), ys[k] === null ? NaN : share(both[1], ys[k])]) : [];
    marks[i].replaceChildren(...points.filter(([x, y]) => x >= 0 && x <= 1 && y >= 0 && y <= 1).map(([x, y]) =>
      element("use", { href: symbols[i], class: `mark ${shapes[i]}`, x: percent(x), y: percent(1 - y) })));
  };
  const draw = () => {
    const both = axes();
    drawTicks("x", both[0]);
    drawTicks("y", both[1]);
    data.series.forEach((_, i) => drawSeries(i, both));
    leave();
  };

  controls.addEventListener("change", (event) => {
    const { name, value, type, checked } = event.target;
    choice[name] = type === "checkbox" ? (checked ? "log" : "linear") : value;
    draw();
  });
  controls.addEventListener("submit", (event) => event.preventDefault());

  // The legend shows and hides variants, and lights one up
  for (const item of figure.querySelectorAll(".legend button")) {
    const i = Number(item.dataset.series);
    item.addEventListener("click", () => {
      if (!hidden.delete(i)) hidden.add(i);
      item.setAttribute("aria-pressed", String(!hidden.has(i)));
      for (const group of [groups[i], marks[i]]) group.classList.toggle("off", hidden.has(i));
    });
    const light = (on) => {
      frame.classList.toggle("dim", on);
      for (const group of [groups[i], marks[i]]) group.classList.toggle("lit", on);
    };
    item.addEventListener("pointerenter", (event) => { if (event.pointerType === "mouse") light(true); });
    item.addEventListener("pointerleave", () => light(false));
  }

  // A cursor with the values of all variants at one place
  let at = null;
  const grid = () => {
    const shown = data.series.map((each, i) => (hidden.has(i) ? [] : each[choice.source].x[choice.x] || []));
    return shown.reduce((best, xs) => (xs.length > best.length ? xs : best), []);
  };
  const nearest = (xs, value, ax) => {
    let best = -1, least = Infinity;
    xs.forEach((x, i) => {
      const off = Math.abs(share(ax, x) - share(ax, value));
      if (off < least) [best, least] = [i, off];
    });
    return least < 0.04 ? best : -1;
  };
  const read = (each, output, value, ax) => {
    const found = each[choice.source];
    const k = nearest(found.x[choice.x] || [], value, ax);
    const y = k < 0 ? null : (found.mean[choice.y] || [])[k];
    output.textContent = y ?? "";
    if (output.textContent && found.low && found.low[choice.y]) {
      const range = document.createElement("small");
      range.textContent = `${found.low[choice.y][k]} to ${found.high[choice.y][k]}`;
      output.append(range);
    }
  };
  const point = (value) => {
    const [ax] = axes();
    at = value;
    const x = share(ax, value);
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", percent(x));
    cursor.setAttribute("x2", percent(x));
    reading.textContent = `at ${value.toLocaleString("en")} ${choice.x === "flops" ? "FLOPs" : choice.x}`;
    data.series.forEach((each, i) => read(each, outputs[i], value, ax));
  };
  const leave = () => {
    at = null;
    cursor.setAttribute("visibility", "hidden");
    for (const output of [reading, ...outputs]) output.textContent = "";
  };
  const follow = (event) => {
    const [ax] = axes(), box = frame.getBoundingClientRect(), xs = grid();
    if (!xs.length) return;
    const wanted = (event.clientX - box.left) / box.width;
    point(xs.reduce((best, x) => (Math.abs(share(ax, x) - wanted) < Math.abs(share(ax, best) - wanted) ? x : best)));
  };
  frame.addEventListener("pointermove", follow);
  frame.addEventListener("pointerdown", follow);
  frame.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
  frame.addEventListener("blur", leave);
  frame.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], xs = grid();
    const ends = { Home: 0, End: xs.length - 1 }[event.key];
    if ((step === undefined && ends === undefined) || !xs.length) return;
    event.preventDefault();
    const now = at === null ? xs.length - 1 : Math.min(Math.max(xs.indexOf(at) + (step || 0), 0), xs.length - 1);
    point(xs[ends === undefined ? now : ends]);
  });
})();
