"use strict";
(() => {
  const all = (root, what) => Array.from(root.querySelectorAll(what));

  // Which block of an array a device holds, from the spec's text: "." whole, "fsdp" or "fsdp+tensor" divided.
  const holder = (mesh, spec, shape) => {
    const axes = Object.entries(mesh);
    const dims = spec === "whole" ? [] : spec.split(" ").map((dim) => (dim === "." ? [] : dim.split("+")));
    const parts = shape.map((_, d) => (dims[d] || []).reduce((n, axis) => n * (mesh[axis] || 1), 1));
    const at = (device) => {
      const place = {};
      for (const [axis, size] of axes.slice().reverse()) {
        place[axis] = device % size;
        device = Math.floor(device / size);
      }
      const index = shape.map((_, d) =>
        (dims[d] || []).reduce((n, axis) => n * (mesh[axis] || 1) + (place[axis] || 0), 0));
      const number = index.reduce((n, i, d) => n * parts[d] + i, 0);
      const range = index.map((i, d) => {
        const size = shape[d] / parts[d];
        return parts[d] === 1 ? ":" : `${i * size}:${(i + 1) * size}`;
      });
      return { place, index, number, range: `[${range.join(", ")}]` };
    };
    return { at, parts, blocks: parts.reduce((a, b) => a * b, 1) };
  };

  // Along the dim of most parts the hue, along the others the lightness: dark letters can be read on all of them.
  const colour = (held, parts) => {
    const main = parts.indexOf(Math.max(...parts, 1));
    const rest = parts.map((n, d) => (d === main ? 1 : n));
    const others = rest.reduce((a, b) => a * b, 1);
    const other = held.index.reduce((n, i, d) => (d === main ? n : n * rest[d] + i), 0);
    const hue = main < 0 || parts[main] === 1 ? 210 : (320 * held.index[main]) / parts[main];
    const lighter = others === 1 ? 68 : 58 + (24 * other) / (others - 1);
    return `hsl(${hue.toFixed(0)} 62% ${(lighter - (held.index[main] % 2 ? 4 : 0)).toFixed(0)}%)`;
  };

  const show = (root, button) => {
    const figure = root.querySelector("[data-mesh]");
    const mesh = JSON.parse(figure.dataset.mesh);
    const found = holder(mesh, button.dataset.spec, JSON.parse(button.dataset.shape));
    let devices = 1;
    for (const size of Object.values(mesh)) devices *= size;
    for (const cell of all(figure, "[data-device]")) {
      const held = found.at(Number(cell.dataset.device));
      const place = Object.entries(held.place).map(([axis, n]) => `${axis}=${n}`).join(" ");
      cell.querySelector("rect").style.fill = colour(held, found.parts);
      const written = cell.querySelector("text");
      if (written) written.textContent = held.number;
      cell.dataset.block = held.number;
      cell.querySelector("title").textContent = `device ${cell.dataset.device} (${place}): block ${held.number}, ${held.range}`;
    }
    for (const other of all(root, "[data-spec]")) other.setAttribute("aria-pressed", String(other === button));
    for (const row of all(root, ".placement tr")) row.classList.toggle("on", row.contains(button));
    const copies = devices / found.blocks;
    const words = found.blocks === 1 ? "whole on every device"
      : `${found.blocks} blocks, ${copies === 1 ? "each on one device" : `each on ${copies} devices`}`;
    root.querySelector(".chosen").textContent = `${button.dataset.name}: ${words}. One colour, one block.`;
  };

  const sift = (field) => {
    const area = field.closest("section, details, .shardtrain");
    const rows = all(area, "tbody tr");
    const count = area.querySelector(".count");
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let left = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        left += row.hidden ? 0 : 1;
      }
      count.textContent = `${left} of ${rows.length}`;
    });
  };

  const tell = (figure, mark) => {
    const line = figure.querySelector(".detail");
    for (const other of all(figure, ".lit")) other.classList.remove("lit");
    mark.classList.add("lit");
    let words = mark.dataset.detail;
    if (mark.dataset.row !== undefined) {
      const rows = all(figure.closest("section"), ".candidates tbody tr");
      const cells = all(rows[Number(mark.dataset.row)], "td").map((cell) => cell.textContent);
      words = `${cells[0]}: ${cells[1]}, ${cells[2]} (${cells[4]}). ${cells[5]}`;
      for (const row of rows) row.classList.toggle("on", row === rows[Number(mark.dataset.row)]);
    }
    line.textContent = words;
  };

  const point = (figure) => {
    for (const picture of all(figure, "svg")) {
      const marks = all(picture, "[data-detail], [data-row]");
      if (!marks.length) continue;
      const steps = marks.filter((mark) => !mark.classList.contains("part"));
      let at = -1;
      picture.setAttribute("tabindex", "0");
      for (const inner of all(picture, "[tabindex]")) inner.removeAttribute("tabindex");
      picture.addEventListener("pointerover", (event) => {
        if (marks.includes(event.target)) tell(figure, event.target);
      });
      picture.addEventListener("keydown", (event) => {
        const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (!way) return;
        event.preventDefault();
        at = (at + way + steps.length) % steps.length;
        tell(figure, steps[at]);
      });
      picture.addEventListener("focus", () => { if (at < 0 && steps.length) tell(figure, steps[at = 0]); });
    }
  };

  for (const root of all(document, ".shardtrain:not([data-ready])")) {
    root.dataset.ready = "";
    all(root, ".filter").forEach(sift);
    all(root, "figure.picture").forEach(point);
    for (const area of all(root, "section").filter((found) => found.querySelector("[data-mesh]"))) {
      const buttons = all(area, "[data-spec]");
      for (const button of buttons) button.addEventListener("click", () => show(area, button));
      const divided = buttons.find((button) => button.dataset.spec !== "whole");
      if (buttons.length) show(area, divided || buttons[0]);
    }
  }
})();
