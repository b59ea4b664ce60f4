"use strict";

/** The bytes of the element blob-NAME, which packing.py wrote at 15 bits a character, gunzipped. */
async function unpack(name) {
  const element = document.getElementById(`blob-${name}`);
  const text = element.textContent;
  const packed = new Uint8Array(Number(element.dataset.packed));
  let held = 0, bits = 0, at = 0;
  for (let i = 0; i < text.length && at < packed.length; i++) {
    held = (held << 15) | (text.charCodeAt(i) - 0x100);
    bits += 15;
    while (bits >= 8 && at < packed.length) {
      bits -= 8;
      packed[at++] = held >> bits;
    }
    held &= (1 << bits) - 1;
  }
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const bytes = new Uint8Array(Number(element.dataset.size));
  let filled = 0;
  for (const reader = stream.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return bytes;
    bytes.set(value, filled);
    filled += value.length;
  }
}
