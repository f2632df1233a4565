"use strict";
// Hover shows the nearest point of what is shown, legends hide and show arms, headers sort. Without it the page reads on.
(() => {
  const REACH = 26; // of the pointer, in a panel's units
  const tip = document.getElementById("tip");

  const place = (event) => {
    const { width, height } = tip.getBoundingClientRect();
    const room = document.documentElement.clientWidth;
    const left = Math.max(6, Math.min(event.clientX + 14, room - width - 6));
    const above = event.clientY - height - 14;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 6 ? above : event.clientY + 18}px`;
  };

  for (const panel of document.querySelectorAll("svg.panel")) {
    const ring = panel.querySelector(".ring");
    const groups = [...panel.querySelectorAll("[data-points]")].map((group) => ({
      group,
      points: JSON.parse(group.dataset.points),
    }));
    const hide = () => {
      tip.hidden = true;
      ring.setAttribute("visibility", "hidden");
    };
    const look = (event) => {
      const matrix = panel.getScreenCTM();
      const x = (event.clientX - matrix.e) / matrix.a;
      const y = (event.clientY - matrix.f) / matrix.d;
      let best = null;
      let least = REACH * REACH;
      for (const { group, points } of groups) {
        if (group.classList.contains("off")) continue;
        for (const point of points) {
          const away = (point[0] - x) ** 2 + (point[1] - y) ** 2;
          if (away < least) [best, least] = [point, away];
        }
      }
      if (best === null) return hide();
      ring.setAttribute("cx", best[0]);
      ring.setAttribute("cy", best[1]);
      ring.setAttribute("visibility", "visible");
      tip.textContent = best[2];
      tip.hidden = false;
      place(event);
    };
    panel.addEventListener("pointermove", look);
    panel.addEventListener("pointerdown", look);
    panel.addEventListener("pointerleave", hide);
  }

  for (const figure of document.querySelectorAll("figure.chart")) {
    const keys = [...figure.querySelectorAll("button.key")];
    const show = (key, shown) => {
      key.setAttribute("aria-pressed", String(shown));
      for (const part of figure.querySelectorAll("[data-arm]")) {
        if (part.dataset.arm === key.dataset.key) part.classList.toggle("off", !shown);
      }
    };
    for (const key of keys) {
      key.addEventListener("click", () => show(key, key.getAttribute("aria-pressed") !== "true"));
      // alone, or all again
      key.addEventListener("dblclick", () => {
        const alone = keys.every((other) => other === key || other.getAttribute("aria-pressed") === "false");
        for (const other of keys) show(other, alone || other === key);
      });
    }
  }

  const order = new Intl.Collator(undefined, { numeric: true });
  for (const table of document.querySelectorAll("table.sortable")) {
    const headers = [...table.querySelectorAll("thead th")];
    const body = table.tBodies[0];
    headers.forEach((header, column) => {
      const button = header.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const number = header.classList.contains("number");
        const before = header.getAttribute("aria-sort");
        const falling = before === null ? number : before === "ascending"; // of numbers the largest first
        for (const other of headers) other.removeAttribute("aria-sort");
        header.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
        const rows = [...body.rows].map((row) => [value(row), row]);
        rows.sort(([a], [b]) => {
          if (number && (a === "" || b === "")) return (a === "") - (b === ""); // what is missing goes last
          const difference = number ? Number(a) - Number(b) : order.compare(a, b);
          return falling ? -difference : difference;
        });
        for (const [, row] of rows) body.append(row);
      });
    });
  }

  // a link to a run opens what is folded there
  const unfold = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  addEventListener("hashchange", unfold);
  unfold();
})();
