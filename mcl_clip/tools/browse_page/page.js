"use strict";

const form = document.getElementById("form");
const text = document.getElementById("text");
const gallery = document.getElementById("gallery");
const file = document.getElementById("file");
const said = document.getElementById("said");
const found = document.getElementById("found");
let asked = 0;

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (text.value.trim()) search(`for “${text.value.trim()}”`, { text: text.value });
});
gallery.addEventListener("change", () => {
  found.replaceChildren();
  said.textContent = "";
});
file.addEventListener("change", () => {
  if (file.files.length) search(`like ${file.files[0].name}`, {}, file.files[0]);
  file.value = "";
});

async function search(what, query, body) {
  const number = ++asked;
  said.textContent = "Searching …";
  found.setAttribute("aria-busy", "true");
  try {
    const address = new URLSearchParams({ gallery: gallery.value, ...query });
    const answer = await fetch(`search?${address}`, body ? { method: "POST", body } : {});
    const result = await answer.json();
    if (number !== asked) return;
    if (result.error) throw new Error(result.error);
    said.textContent = `Images ${what}`;
    found.replaceChildren(...result.found.map(row));
  } catch (error) {
    if (number === asked) said.textContent = `Search failed: ${error.message}`;
  } finally {
    found.removeAttribute("aria-busy");
  }
}

function row({ model, pictures }) {
  const section = document.createElement("section");
  const title = document.createElement("h2");
  title.textContent = model;
  const list = document.createElement("ul");
  list.append(...pictures.map(item));
  section.append(title, list);
  return section;
}

function item({ row: number, score, words }) {
  const image = document.createElement("img");
  image.src = `picture?${new URLSearchParams({ gallery: gallery.value, row: number })}`;
  image.alt = words || `image ${number}`;
  image.width = image.height = 120;
  const button = document.createElement("button");
  button.type = "button";
  button.title = `${words}\ncosine ${score.toFixed(3)}. Click to search with this image.`;
  button.append(image);
  button.addEventListener("click", () => {
    search(`like “${words || `image ${number}`}”`, { row: number });
    scrollTo({ top: 0 });
  });
  const cosine = document.createElement("span");
  cosine.className = "soft small";
  cosine.textContent = score.toFixed(2);
  const entry = document.createElement("li");
  entry.append(button, cosine);
  return entry;
}
