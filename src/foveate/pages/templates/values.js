"use strict";
// Small helpers of all pages: packed numbers, elements, and texts of tokens. Texts are set as text, never as markup.

const byId = (id) => document.getElementById(id);
const highest = (width) => (width === 1 ? 255 : 65535);
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function unpack(text, width) {
  const characters = atob(text), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < characters.length; i += 1) bytes[i] = characters.charCodeAt(i);
  if (width === 1) return bytes;
  const view = new DataView(bytes.buffer), read = width === 2 ? "getUint16" : "getUint32";
  return Array.from({ length: bytes.length / width }, (_, i) => view[read](i * width, true));
}

const unpacked = new Map();
function numbersOf(holder, name, width) {
  if (!unpacked.has(holder)) unpacked.set(holder, {});
  const found = unpacked.get(holder);
  found[name] ??= unpack(holder[name], width);
  return found[name];
}

function show(value) {
  return value === null || !Number.isFinite(value) ? "–" : String(Number(value.toPrecision(4)));
}

function element(name, className, text) {
  const found = document.createElement(name);
  if (className) found.className = className;
  if (text !== undefined) found.textContent = text;
  return found;
}

const inLine = (text) => text.replaceAll("\n", "↵");

function quoted(tokens, first, last = first + 1) {
  const text = inLine(tokens.slice(first, last).join(""));
  return `“${text.length > 60 ? `${text.slice(0, 40)} … ${text.slice(-16)}` : text}”`;
}

// A colour of the page as red, green and blue.
function colour(name) {
  const text = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

const mixed = (from, to, share) => from.map((low, i) => Math.round(low + (to[i] - low) * share));
const onScheme = (draw) => matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
