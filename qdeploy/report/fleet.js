"use strict";
const rows = [...document.querySelectorAll("#table tbody tr")];
const texts = rows.map((row) => row.textContent.toLowerCase());
const selects = [...document.querySelectorAll(".tools select")];
const search = document.getElementById("text");
function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  rows.forEach((row, i) => {
    const fits = words.every((word) => texts[i].includes(word))
      && selects.every((one) => !one.value || row.dataset[one.id] === one.value);
    row.hidden = !fits;
    shown += fits;
  });
  document.getElementById("shown").textContent = `${shown} shown`;
}
[search, ...selects].forEach((one) => one.addEventListener("input", filter));
const body = document.querySelector("#table tbody");
const heads = [...document.querySelectorAll("#table th[scope=col]")];
const value = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
const compared = (x, y) => {
  const difference = Number(x) - Number(y);
  return Number.isNaN(difference) ? x.localeCompare(y) : difference;
};
heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
  const down = head.getAttribute("aria-sort") === "ascending";
  heads.forEach((one) => one.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const order = rows.map((row) => [value(row, column), row]).sort(([x], [y]) => {
    if (!x || !y) return (x ? 0 : 1) - (y ? 0 : 1);  // what was not measured comes last
    return (down ? -1 : 1) * compared(x, y);
  });
  body.replaceChildren(...order.map(([, row]) => row));
}));
filter();
