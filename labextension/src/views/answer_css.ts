/** Looks of a live answer, and of what it shares with a job: the phase bar, the heads, the placement. */

export const PHASE_CSS = `
.head { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 12px; min-height: 28px; }
.head-words { flex: 1 1 220px; min-width: 0; overflow-wrap: anywhere; }
.head-title { font-weight: 600; margin-right: 8px; }
.head-tools { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 8px; margin-left: auto; }
.stop-control:empty { display: none; }
.answer-time, .job-time { white-space: nowrap; }
.copy-control { display: inline-flex; flex-wrap: wrap; align-items: center; gap: 4px 8px; }
.pb {
  position: relative; height: 8px; margin: 6px 0 8px; overflow: hidden; border-radius: 4px;
  background: color-mix(in srgb, var(--muted) 26%, transparent);
}
.pb-done { height: 100%; width: var(--share); background: var(--accent); border-radius: inherit; transition: width .25s ease-out; }
.pb.ticks { border-radius: 2px; }
.pb.ticks {
  -webkit-mask: repeating-linear-gradient(90deg, #000 0 calc(100% / var(--ticks) - 2px), transparent 0 calc(100% / var(--ticks)));
  mask: repeating-linear-gradient(90deg, #000 0 calc(100% / var(--ticks) - 2px), transparent 0 calc(100% / var(--ticks)));
}
.pb.ticks .pb-done { border-radius: 0; }
.pb.unknown .pb-done { width: 28%; animation: pb-wander 1.8s ease-in-out infinite alternate; }
@keyframes pb-wander { from { margin-left: 0; } to { margin-left: 72%; } }
@media (prefers-reduced-motion: reduce) { .pb.unknown .pb-done { width: 100%; opacity: .45; } }
@media (forced-colors: active) {
  .pb { forced-color-adjust: none; background: Canvas; outline: 1px solid CanvasText; }
  .pb-done { background: Highlight; }
}
`

export const ANSWER_CSS = `${PHASE_CSS}
.answer-frame { position: relative; margin: 2px 0 8px; }
.answer-text {
  max-height: 60vh; min-height: 1.6em; overflow: auto; overscroll-behavior: auto; padding: 2px 2px 2px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; font-size: 14px; line-height: 1.55;
}
.answer-text:focus-visible { outline-offset: 0; border-radius: 2px; }
.llm .newest {
  position: absolute; right: 14px; bottom: 8px; border-radius: 999px; box-shadow: 0 1px 6px rgba(0,0,0,.35); background: var(--page);
}
.answer-note { margin: 4px 0 10px; }
.answer-foot { display: flex; flex-wrap: wrap; align-items: center; gap: 2px 20px; font-size: 12px; color: var(--muted); }
.figures { display: flex; flex-wrap: wrap; gap: 0 0; min-height: 1.5em; }
.figure:not(:last-child)::after { content: '·'; margin: 0 .55em; }
.figure.lead { color: var(--text); }
.place { display: flex; flex-wrap: wrap; align-items: center; gap: 2px 10px; }
.place-bar {
  display: flex; gap: 1px; width: 120px; height: 10px; border-radius: 3px; overflow: hidden; background: var(--page);
}
.place-part { flex: var(--part) 1 0; min-width: 3px; }
.place-words { display: flex; flex-wrap: wrap; gap: 0 12px; }
.place-word { white-space: nowrap; }
.place-swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; vertical-align: -1px; }
`
