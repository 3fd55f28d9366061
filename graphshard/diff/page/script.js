"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const rows = [...document.querySelectorAll(".row")];
  const modules = [...document.querySelectorAll(".graph details")].reverse(); // inner ones first
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const hidden = new Set(); // kinds switched off
  let hits = [], at = -1, selected = null;

  const kindOf = (row) => row.dataset.kind;
  const differs = (row) => kindOf(row) !== "same";
  const shown = (row) => !row.hidden && !row.closest("details:not([open])");
  const numberOf = (row) => Number(row.id.slice(1));

  function show() {
    const only = $("only").checked && $("search").value.trim() !== "";
    const matching = new Set(hits);
    for (const row of rows) row.hidden = hidden.has(kindOf(row)) || (only && !matching.has(row));
    for (const module of modules) module.hidden = !module.querySelector(":scope > .rows > .row:not([hidden]), :scope > details:not([hidden])");
  }

  function search() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    hits = words.length ? rows.filter((_, i) => words.every((word) => texts[i].includes(word))) : [];
    const matching = new Set(hits);
    for (const row of rows) row.classList.toggle("hit", matching.has(row));
    mark(words);
    at = -1;
    $("matches").value = words.length ? `${hits.length} rows` : "";
    show();
  }

  // Ranges leave the rows as they are; browsers without them still tint the row.
  function mark(words) {
    if (!window.Highlight) return;
    const ranges = [];
    for (const row of hits.slice(0, 2000)) {
      for (const cell of row.querySelectorAll("span")) {
        const node = cell.firstChild;
        if (!node) continue;
        const low = node.data.toLowerCase();
        for (const word of words) {
          for (let from = low.indexOf(word); from >= 0; from = low.indexOf(word, from + word.length)) {
            const range = document.createRange();
            range.setStart(node, from);
            range.setEnd(node, Math.min(from + word.length, node.length));
            ranges.push(range);
          }
        }
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  }

  function step(by) {
    const usable = hits.filter((row) => !hidden.has(kindOf(row)));
    if (!usable.length) return;
    at = (at < 0 && by < 0 ? usable.length - 1 : at + by + usable.length) % usable.length;
    $("matches").value = `${at + 1} of ${usable.length} rows`;
    select(usable[at], document.activeElement !== $("search"));
  }

  function reveal(row) {
    for (let outer = row.closest("details"); outer; outer = outer.parentElement.closest("details")) outer.open = true;
    // Twice: rows that were never drawn have a guessed height.
    for (let i = 0; i < 2; i++) row.scrollIntoView({ block: "nearest" });
  }

  function element(name, text, inside) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (inside) inside.append(made);
    return made;
  }

  // The text of a side stands in the row, or in its partner's where a pair is two rows.
  const textOf = (row, partner, column) => [row, partner].map((one) => one && one.children[column].textContent).find(Boolean);

  function side(title, entry, text, outer) {
    const box = element("div", undefined, outer);
    element("h3", title, box);
    if (!entry) return void element("p", "not there", box);
    element("pre", text, box);
    const list = element("dl", undefined, box);
    for (const [name, value] of [["graph", entry.graph], ...Object.entries(entry.attributes)]) {
      element("dt", name, list);
      element("dd", value, list);
    }
  }

  function select(row, focus = true) {
    if (selected) selected.classList.remove("on");
    for (const old of document.querySelectorAll(".partner")) old.classList.remove("partner");
    selected = row;
    row.classList.add("on");
    const partner = row.dataset.partner && $(row.dataset.partner);
    if (partner) partner.classList.add("partner");
    const found = data[numberOf(row)];
    const panel = $("panel");
    panel.replaceChildren();
    const title = element("h3", `${found.kind}${found.by.length ? " by " + found.by.join(", ") : ""} `, panel);
    if (partner) {
      const button = element("button", "go to its partner (p)", title);
      button.onclick = jump;
    }
    const close = element("button", "close", title);
    close.onclick = () => (panel.hidden = true);
    if (found.what.length) {
      const list = element("ul", undefined, panel);
      for (const line of found.what) element("li", line, list);
    }
    const sides = element("div", undefined, panel);
    sides.className = "sides";
    side(found.kind === "duplicated" ? "original" : "before", found.before, textOf(row, partner, 0), sides);
    side("after", found.kind === "same" ? found.before : found.after, textOf(row, partner, 2), sides);
    panel.hidden = false;
    reveal(row);
    if (focus) row.focus({ preventScroll: true });
  }

  function jump() {
    const partner = selected && selected.dataset.partner && $(selected.dataset.partner);
    if (partner) select(partner);
  }

  function walk(by, wanted) {
    let i = selected ? rows.indexOf(selected) : by > 0 ? -1 : rows.length;
    do i += by; while (rows[i] && !wanted(rows[i]));
    if (rows[i]) select(rows[i]);
  }

  const keys = {
    j: () => walk(1, shown), ArrowDown: () => walk(1, shown),
    k: () => walk(-1, shown), ArrowUp: () => walk(-1, shown),
    ".": () => walk(1, (row) => !row.hidden && differs(row)), ",": () => walk(-1, (row) => !row.hidden && differs(row)),
    n: () => step(1), N: () => step(-1), p: jump,
    "/": () => $("search").select(),
    Enter: () => { const module = selected && selected.closest("details"); if (module) module.open = !module.open; },
    Escape: () => { $("panel").hidden = true; },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target === $("search")) {
      if (event.key === "Enter") step(event.shiftKey ? -1 : 1);
      else if (event.key === "Escape") { $("search").value = ""; search(); $("search").blur(); }
      else return;
      return event.preventDefault();
    }
    if (!keys[event.key] || event.target.closest("button, summary, input")) return;
    event.preventDefault();
    keys[event.key]();
  });
  $("main").addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row && getSelection().isCollapsed) select(row);
  });
  $("search").addEventListener("input", search);
  $("only").addEventListener("change", show);
  $("wrap").addEventListener("change", () => document.body.classList.toggle("wrap", $("wrap").checked));
  $("next").onclick = () => step(1);
  $("previous").onclick = () => step(-1);
  $("expand").onclick = () => modules.forEach((module) => (module.open = true));
  $("collapse").onclick = () => modules.forEach((module) => (module.open = false));
  for (const chip of document.querySelectorAll(".chip")) {
    chip.onclick = () => {
      const off = chip.getAttribute("aria-pressed") === "true";
      chip.setAttribute("aria-pressed", String(!off));
      hidden[off ? "add" : "delete"](chip.dataset.kind);
      show();
    };
  }
})();
