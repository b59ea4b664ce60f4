"use strict";

const names = [...document.querySelectorAll("script[id^='blob-']")].map((element) => element.id.slice(5));
Promise.all(names.map(unpack)).then((found) => {
  document.getElementById("found").textContent = names.map((name, i) => `${name}: ${found[i].length} bytes`).join(", ");
});
