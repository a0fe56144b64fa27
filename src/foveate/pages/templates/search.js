"use strict";
// Search in the joined text of tokens, so that a word of several tokens is found.

function finder(tokens) {
  const lowered = tokens.map((token) => token.toLowerCase()), starts = [0];
  for (const token of lowered) starts.push(starts.at(-1) + token.length);
  const joined = lowered.join("");
  const tokenAt = (place) => {
    let low = 0, high = lowered.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (starts[middle + 1] > place) high = middle;
      else low = middle + 1;
    }
    return low;
  };
  // The first and the last token of each place of a text.
  return (text) => {
    const wanted = text.toLowerCase(), found = [];
    for (let at = wanted ? joined.indexOf(wanted) : -1; at >= 0; at = joined.indexOf(wanted, at + wanted.length)) {
      found.push([tokenAt(at), tokenAt(at + wanted.length - 1)]);
    }
    return found;
  };
}

function placesFound(count, wanted) {
  return wanted ? `${count || "no"} place${count === 1 ? "" : "s"}; Enter goes to the next` : "";
}
