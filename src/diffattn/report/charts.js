"use strict";

/* Draws every chart of the page from its specification. A parameter of one name is one parameter in all charts; where
   the page holds a grid of numbers, its parameters are places in that grid, and the table follows them. */

(async () => {
  const read = (id) => JSON.parse(document.getElementById(id)?.textContent ?? "null");
  const options = { ast: true, renderer: "svg", actions: false, defaultStyle: false, tooltip: { disableDefaultStyle: true } };
  const views = [];
  for (const [id, chart] of Object.entries(read("charts"))) {
    views.push((await vegaEmbed(document.getElementById(id), chart, options)).view);
  }
  const grid = read("grid");
  if (grid) follow(views, grid);
  document.documentElement.dataset.charts = views.length;
})();

function follow(views, grid) {
  const names = ["context", "batch"], first = views[0];
  const place = (name) => first.signal(name);

  function show() {
    for (const name of names) {
      const words = grid.words[name][place(name)];
      document.getElementById(`${name}-words`).textContent = words;
      document.querySelector(`#controls [name="${name}"]`).setAttribute("aria-valuetext", words);
      for (const view of views.slice(1)) view.signal(name, place(name)).run();
    }
    const point = place("context") * grid.batch.length + place("batch");
    for (const cell of document.querySelectorAll("[data-cell]")) {
      const found = grid.cells[cell.dataset.cell];
      [cell.textContent, cell.title] = found[found.length === 1 ? 0 : point];
    }
    const address = names.map((name) => `${name}=${grid[name][place(name)]}`).join("&");
    // A page inside another document may have no address to change.
    try { history.replaceState(null, "", `#${address}`); } catch { /* the numbers change all the same */ }
  }

  /* A setting's address can be shared: #context=8192&batch=4; what the grid does not hold is left out. */
  function fromAddress() {
    for (const [name, value] of new URLSearchParams(location.hash.slice(1))) {
      const found = names.includes(name) ? grid[name].indexOf(Number(value)) : -1;
      if (found >= 0) first.signal(name, found);
    }
    first.run();
    show();
  }

  for (const name of names) first.addSignalListener(name, show);
  addEventListener("hashchange", fromAddress);
  fromAddress();
}
