"use strict";

/**
 * Stands in for WebAssembly.Suspending and WebAssembly.promising where the browser has them not. The runtime waits in
 * them for WebGPU alone, so that what runs on WebAssembly never waits; returns whether the browser has its own.
 */
function allowWasmWithoutSuspending() {
  if ("Suspending" in WebAssembly) return true;
  WebAssembly.Suspending = function (imported) { return imported; };
  WebAssembly.promising = (exported) => async (...values) => exported(...values);
  return false;
}
