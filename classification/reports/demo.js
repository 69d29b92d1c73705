"use strict";
// Classifies a picture with every network of the page. MODELS and RUNTIME, in base64, come from the files beside it:
// scripts, as a page that is opened from a disk may read nothing else.
const about = JSON.parse(document.getElementById("content").textContent);
const find = (id) => document.getElementById(id);
const MOST = 5; // classes that are shown

function bytes(base64) {
  const text = atob(base64);
  const found = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i);
  return found;
}

function roundEven(value) {
  const below = Math.floor(value);
  return value - below === 0.5 ? below + (below % 2) : Math.round(value);
}

// Weights of the inputs of each output pixel, as torch resizes without aliasing: [first input, weights].
function filters(from, to, kind) {
  const scale = from / to;
  if (kind === "nearest") {
    return Array.from({ length: to }, (_, i) => [Math.min(Math.floor(i * scale), from - 1), [1]]);
  }
  const stretch = Math.max(scale, 1);
  const reach = (kind === "bicubic" ? 2 : 1) * stretch;
  const a = -0.5;
  const curve = {
    bilinear: (x) => Math.max(0, 1 - x),
    bicubic: (x) => (x < 1 ? ((a + 2) * x - (a + 3)) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0),
  }[kind];
  return Array.from({ length: to }, (_, i) => {
    const centre = scale * (i + 0.5);
    const first = Math.max(0, Math.floor(centre - reach + 0.5));
    const last = Math.min(from, Math.floor(centre + reach + 0.5));
    const weights = [];
    for (let k = first; k < last; k++) weights.push(curve(Math.abs((k - centre + 0.5) / stretch)));
    const sum = weights.reduce((one, other) => one + other, 0);
    return [first, weights.map((weight) => weight / sum)];
  });
}

// RGBA pixels of width x height to the bytes (3, size, size) that a network sees.
function fit(pixels, width, height, seen) {
  const short = Math.min(width, height);
  const squash = seen.crop === "squash";
  const wide = squash ? seen.resize : Math.trunc((seen.resize * width) / short);
  const high = squash ? seen.resize : Math.trunc((seen.resize * height) / short);
  const size = seen.img_size;
  const left = roundEven((wide - size) / 2);
  const top = roundEven((high - size) / 2);
  const columns = filters(width, wide, wide === width ? "nearest" : seen.interpolation).slice(left, left + size);
  const rows = filters(height, high, high === height ? "nearest" : seen.interpolation).slice(top, top + size);
  const narrow = new Uint8ClampedArray(height * size * 3);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < size; x++) {
      const [first, weights] = columns[x];
      let [red, green, blue] = [0, 0, 0];
      for (let k = 0; k < weights.length; k++) {
        const at = 4 * (y * width + first + k);
        red += weights[k] * pixels[at];
        green += weights[k] * pixels[at + 1];
        blue += weights[k] * pixels[at + 2];
      }
      narrow.set([red, green, blue], 3 * (y * size + x));
    }
  }
  const found = new Uint8ClampedArray(3 * size * size);
  for (let y = 0; y < size; y++) {
    const [first, weights] = rows[y];
    for (let x = 0; x < size; x++) {
      for (let colour = 0; colour < 3; colour++) {
        let sum = 0;
        for (let k = 0; k < weights.length; k++) sum += weights[k] * narrow[3 * ((first + k) * size + x) + colour];
        found[(colour * size + y) * size + x] = sum;
      }
    }
  }
  return new Uint8Array(found.buffer);
}

function pixelsOf(bitmap) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // behind what is transparent
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

function element(kind, text, parent) {
  const made = document.createElement(kind);
  made.textContent = text;
  parent.append(made);
  return made;
}

function card(network) {
  const section = element("section", "", find("networks"));
  element("h2", network.role, section);
  const facts = element("p", network.facts, section);
  facts.className = "facts";
  return { facts, list: element("ol", "", section) };
}

function show(list, classes, probabilities) {
  const order = [...probabilities.keys()].sort((one, other) => probabilities[other] - probabilities[one]);
  list.replaceChildren();
  for (const index of order.slice(0, MOST)) {
    const share = `${(100 * probabilities[index]).toFixed(1)} %`;
    const line = element("li", "", list);
    element("span", classes[index] ?? `class ${index}`, line);
    element("span", share, line);
    const track = element("div", "", line);
    track.className = "track";
    element("i", "", track).style.width = share.replace(" ", "");
  }
  return classes[order[0]] ?? `class ${order[0]}`;
}

function softmax(logits) {
  const most = Math.max(...logits);
  const powers = Array.from(logits, (value) => Math.exp(value - most));
  const sum = powers.reduce((one, other) => one + other, 0);
  return powers.map((power) => power / sum);
}

async function run(network, input) {
  const size = network.seen.img_size;
  const images = new ort.Tensor("uint8", input, [1, 3, size, size]);
  const { logits } = await network.session.run({ images });
  return logits.data;
}

function say(text, fault = false) {
  find("verdict").textContent = text;
  find("verdict").className = fault ? "fault" : "";
}

async function classify(networks, file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    say(`${file.name || "This"} is no picture that this browser can read: choose a JPEG or PNG file.`, true);
    return;
  }
  URL.revokeObjectURL(find("picture").src);
  find("picture").src = URL.createObjectURL(file);
  find("picture").hidden = false;
  find("hint").textContent = "Drop or choose another picture";
  const pixels = pixelsOf(bitmap);
  const answers = [];
  for (const network of networks) {
    const input = fit(pixels, bitmap.width, bitmap.height, network.seen);
    const begun = performance.now();
    const logits = await run(network, input);
    const milliseconds = performance.now() - begun;
    answers.push(show(network.list, network.classes, softmax(logits)));
    network.facts.textContent = `${network.facts.dataset.text}, ${milliseconds.toFixed(1)} ms`;
  }
  const alike = answers.every((answer) => answer === answers[0]);
  const verb = answers.length > 1 ? "Both say" : "It says";
  const roles = networks.map((network) => network.role.toLowerCase());
  say(alike ? `${verb}: ${answers[0]}` : answers.map((answer, i) => `The ${roles[i]} says: ${answer}`).join(". "));
}

async function begin() {
  ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
  ort.env.logLevel = "error";
  ort.env.wasm.wasmBinary = bytes(RUNTIME.wasm).buffer;
  ort.env.wasm.wasmPaths = { mjs: URL.createObjectURL(new Blob([bytes(RUNTIME.mjs)], { type: "text/javascript" })) };
  const networks = [];
  for (const [i, network] of about.networks.entries()) {
    const session = await ort.InferenceSession.create(bytes(MODELS[i]), { executionProviders: ["wasm"] });
    const made = { ...network, session, ...card(network) };
    made.facts.dataset.text = network.facts;
    await run(made, new Uint8Array(3 * network.seen.img_size ** 2)); // the first one takes longer
    networks.push(made);
  }
  let last = Promise.resolve();
  const take = (file) => {
    if (file) last = last.then(() => classify(networks, file)).catch(fail);
    return last;
  };
  find("file").addEventListener("change", () => take(find("file").files[0]));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      find("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") take(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
  find("file").disabled = false;
  find("hint").textContent = "Drop a picture here, paste one, or tap to choose";
  document.documentElement.dataset.ready = "yes";
}

function fail(error) {
  find("hint").textContent = "";
  say(`The networks cannot run in this browser: ${error.message ?? error}`, true);
  document.documentElement.dataset.ready = "no";
}

begin().catch(fail);
