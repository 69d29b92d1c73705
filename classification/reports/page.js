"use strict";
(() => {
  const config = {
    background: null,
    font: "system-ui, sans-serif",
    view: { stroke: "var(--grid)" },
    axis: {
      labelColor: "var(--ink)", titleColor: "var(--soft)", domainColor: "var(--grid)", tickColor: "var(--grid)",
      gridColor: "var(--grid)", titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11, labelLimit: 130,
    },
    legend: { labelColor: "var(--ink)", titleColor: "var(--soft)", labelFontSize: 12, symbolStrokeWidth: 2 },
    text: { color: "var(--ink)" },
  };

  const draw = async (holder) => {
    const spec = JSON.parse(holder.querySelector("script").textContent);
    const place = holder.querySelector(".plot");
    try {
      await vegaEmbed(place, { config, ...spec }, { renderer: "svg", actions: false, tooltip: { theme: "custom" } });
      holder.dataset.drawn = "yes";
    } catch (error) {
      place.textContent = `This chart could not be drawn: ${error.message}`;
      holder.dataset.drawn = "no";
    }
  };

  // A cell sorts by its data-value where it has one, and by its text otherwise; cells without a value come last.
  const key = (row, column) => {
    const cell = row.cells[column];
    const text = (cell.dataset.value ?? cell.textContent).trim();
    const number = Number(text);
    return text === "" ? null : Number.isNaN(number) ? text : number;
  };

  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), undefined, { numeric: true });
  };

  const sort = (heading) => {
    const table = heading.closest("table");
    const column = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return down ? compare(b, a) : compare(a, b);
    });
    table.tBodies[0].append(...rows.map(([, row]) => row));
  };

  for (const heading of document.querySelectorAll("table.sortable thead th")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => sort(heading));
  }

  // Printing shows what is folded.
  const folded = [];
  window.addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details:not([open])")) {
      part.open = true;
      folded.push(part);
    }
  });
  window.addEventListener("afterprint", () => {
    for (const part of folded.splice(0)) part.open = false;
  });

  Promise.all([...document.querySelectorAll(".chart")].map(draw)).then(() => {
    document.documentElement.dataset.ready = "yes";
  });
})();
