/** How the memory map and its editor look; colours of fills are those of `theme.ts`. */

export const MAP_CSS = `
.llm .map {
  position: relative; container-type: inline-size;
}
.map p { margin: 3px 0; }
.map .small { font-size: 12px; line-height: 1.3; }

.map .title { display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: baseline; overflow-wrap: anywhere; }
.map .model { font-size: 16px; }
.map .chips { margin: 8px 0 6px; }
.map .chip { overflow-wrap: anywhere; }
.map .chip.proposed { border-style: dashed; border-color: var(--accent); font-weight: 600; }
.map .notes { font-size: 12px; margin-bottom: 6px; }

/* Rows of tiers: name, bar, counts. */
.map .row { display: grid; grid-template-columns: 148px minmax(0, 1fr) 136px; gap: 0 12px; align-items: center; }
.map .field { padding-right: 16px; min-width: 0; }
.map .track { position: relative; }
.map .counts { text-align: right; }
.map .lacks { color: var(--bad-text); font-weight: 600; }
.map .name { overflow-wrap: anywhere; cursor: default; }
.map .tier { position: relative; border-radius: 8px; margin: 0 -8px; padding: 2px 8px; }
.map .change { color: var(--muted); font-weight: 600; }
.map .counts > div:first-child { white-space: nowrap; }
.map .tier > .row:not(.link) > .field > .track {
  background: repeating-linear-gradient(90deg, color-mix(in srgb, var(--line) 60%, transparent) 0 1px, transparent 1px var(--step)) 0 0/100% 100%;
}
.map .bar {
  display: flex; height: 46px; min-width: 4px; border: 1px solid var(--muted); border-radius: 6px; overflow: hidden; position: relative;
  contain: layout paint style;
}
.map .bar.cut { border-right: 2px dotted var(--muted); border-radius: 6px 0 0 6px; }
.map .bar.over { border-color: var(--bad); }
.map .bar.empty { width: 100% !important; border: 1px dashed var(--line); border-radius: 6px; background: var(--page); }
.map.can-edit .bar.empty::after {
  content: attr(data-hint); position: absolute; inset: 0; display: grid; place-items: center; color: var(--muted); font-size: 11px;
}
.map .blocks { display: flex; min-width: 0; }
.map .bar .blocks { flex: 0 1 auto; }
.map .block {
  position: relative; flex: 0 1 auto; min-width: 2px; color: #fff; font-size: 10px; line-height: 1; user-select: none;
  -webkit-user-select: none; cursor: default; text-align: center; overflow: hidden;
}
.map.can-edit .block { cursor: grab; touch-action: none; }
.map.is-dragging, .map.is-dragging .block { cursor: grabbing; }
.map .bar .block { box-shadow: inset -1px 0 0 var(--page); }
.map .bar .block.thin { box-shadow: none; }
.map .block .tag { position: absolute; inset: auto 0 3px; width: fit-content; margin: auto; padding: 0 1px; border-radius: 2px; }
.map .turned .tag { writing-mode: vertical-rl; font-size: 9px; letter-spacing: .3px; padding: 1px 0; }
.map .block:not([data-mark=""])::before { content: attr(data-mark); position: absolute; inset: 3px 0 auto; width: fit-content; margin: auto; font-size: 10px; border-radius: 2px; background: var(--plain); }
.map .block.markless::before { display: none; }
.map .tag { white-space: nowrap; background: var(--plain); }
/* A sign on a pattern has the plain colour behind it. */
.map .fill-ram-streamed, .map .fill-looked-up { --plain: #2f6fd6; }
.map .fill-disk, .map .fill-kept { --plain: #a8680e; }
.map .fill-kv_cache { --plain: #7c4ddb; }
.map .fill-activations { --plain: #c43d70; }
.map .fill-slots { --plain: #0b7f97; }
.map .fill-buffers { --plain: #5f6b78; }
.map .fill-draft, .map .fill-split { --plain: #1a7f5a; }
.map .block > :empty { display: none; }
.map .block:hover { filter: brightness(1.12); }
.map .block:focus-visible { outline: 2px solid var(--text); outline-offset: -2px; box-shadow: inset 0 0 0 3px var(--page); z-index: 2; }
.map .block.selected { box-shadow: inset 0 0 0 2px var(--text), inset 0 0 0 3px var(--page); z-index: 1; }
.map .block.selected:focus-visible { outline-color: var(--accent); }
.map .parts { display: flex; min-width: 0; flex: 0 1 auto; border-radius: 4px; }
.map .parts:focus-visible { outline-offset: -3px; }
.map .part {
  flex: 0 1 auto; min-width: 1px; display: flex; align-items: center; justify-content: center; overflow: hidden; color: #fff; font-size: 10px;
}
.map .part .tag { padding: 0 3px; border-radius: 3px; }
.map .part.is-spare, .map .part.is-beyond, .map .part.is-reserve, .map .part.is-other { color: var(--muted); }
.map .part.is-reserve .tag, .map .part.is-other .tag { background: var(--page); }
.map .part.is-beyond { border-left: 2px solid var(--text); }
.map .more { position: absolute; margin-left: 4px; top: 12px; }
.map .end {
  position: absolute; top: -4px; bottom: -4px; width: 0; border-left: 3px solid var(--bad-text); z-index: 3; pointer-events: none;
}
.map .end span {
  position: absolute; top: 50%; transform: translateY(-50%); left: 4px; padding: 1px 6px; border-radius: 4px; white-space: nowrap;
  background: var(--page); border: 1px solid var(--bad-text); color: var(--text); font-size: 11px; font-weight: 600;
}
.map .end.is-right span { left: auto; right: 7px; }
.map .beyond-end {
  position: absolute; top: 0; bottom: 0; pointer-events: none; z-index: 2; border-radius: 0 6px 6px 0;
  background: repeating-linear-gradient(45deg, rgba(209, 36, 47, .5) 0 3px, transparent 3px 9px);
}
.map .scale-row .track { height: 16px; color: var(--muted); font-size: 10px; }
.map .scale-row .track span { position: absolute; top: 1px; padding-left: 3px; border-left: 1px solid var(--muted); line-height: 1.2; white-space: nowrap; }

/* What travels: as wide as its bytes. */
.map .link { min-height: 26px; }
.map .link .track { height: 22px; display: flex; align-items: center; }
.map .lane { position: absolute; left: 0; top: 0; bottom: 0; min-width: 8px; background: rgba(11, 127, 151, .17); }
.map .lane::before {
  content: ""; position: absolute; inset: 0; display: none; opacity: .45; background: #0b7f97;
  --arrows: conic-gradient(from 135deg at 50% 0, #000 90deg, transparent 0) 0 0/9px 11px; -webkit-mask: var(--arrows); mask: var(--arrows);
}
.map.is-flowing .lane::before { display: block; animation: llm-flow .7s linear infinite; }
.map .traffic { position: relative; margin-left: 4px; padding: 0 6px; border-radius: 999px; max-width: 100%; }
.map.is-flowing .traffic { background: var(--page); margin-left: 18px; }
@keyframes llm-flow { to { -webkit-mask-position: 0 -11px; mask-position: 0 -11px; } }

/* Budgets: the thumb stands where the budget ends in the bar above. */
.map .budget { min-height: 20px; }
.map .budget > :first-child { text-align: right; }
.map .budget > :last-child { text-align: right; }
.map .budget .all { min-height: 18px; padding: 0 6px; }
.map .slider { min-width: 64px; max-width: 100%; }
.map input[type="range"] {
  appearance: none; display: block; width: calc(100% + 12px); height: 18px; margin: 0 -6px; cursor: ew-resize; border-radius: 4px;
  background: linear-gradient(90deg, var(--text) var(--at), var(--line) 0) 6px 50%/calc(100% - 12px) 3px no-repeat;
}
.map input[type="range"]::-webkit-slider-thumb {
  appearance: none; width: 12px; height: 16px; border: 2px solid var(--page); border-radius: 5px; background: linear-gradient(var(--text), var(--text)), var(--page);
}
.map input[type="range"]::-moz-range-thumb { width: 8px; height: 12px; border: 2px solid var(--page); border-radius: 5px; background: var(--text); }
.map input[type="range"]:disabled { cursor: default; opacity: .5; }

/* Drop targets. */
.map .tier.target { outline: 1px dashed var(--accent); outline-offset: -1px; }
.map .tier.aimed { outline: 2px solid var(--accent); background: var(--hover); }
.map.is-dragging .block.selected { opacity: .55; }
.map .ghost, .map .tip { position: absolute; z-index: 10; pointer-events: none; border-radius: 6px; padding: 6px 10px; font-size: 12px; line-height: 1.4; width: max-content; max-width: min(420px, 96%); overflow-wrap: anywhere; }
.map .tip { background: linear-gradient(var(--text), var(--text)), var(--page); color: var(--page); box-shadow: 0 2px 10px rgba(0, 0, 0, .3); }
.map .ghost {
  background: var(--card); color: var(--text); border: 2px solid var(--muted); white-space: nowrap;
  box-shadow: 4px 4px 0 -1px var(--line), 0 3px 12px rgba(0, 0, 0, .35);
}
.map .ghost.can-drop { border-color: var(--accent); }

/* All blocks in model order. */
.map .strip { margin-top: 12px; }
.map .strip .blocks { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 2px 1px; margin-top: 3px; }
.map .column { display: flex; flex-direction: column; min-width: 0; }
.map .strip .block { height: 30px; border-radius: 3px; font-size: 10px; }
.map .strip .block .tag { bottom: 5px; padding: 0 2px; }
.map .tick { height: 13px; font-size: 10px; line-height: 13px; text-align: center; white-space: nowrap; }
.map .meter { display: none; flex-direction: column-reverse; height: 40px; margin-bottom: 6px; border-bottom: 1px solid var(--line); }
.map .is-live .meter { display: flex; }
.map .meter i { display: block; flex: 0 0 auto; }
.map .totals { margin-top: 4px; }
.map .time-compute { background: #1a7f5a; }
.map .time-copy { background: repeating-linear-gradient(45deg, rgba(255,255,255,.3) 0 2px, transparent 2px 5px), #0b7f97; }
.map .time-wait { background: repeating-linear-gradient(0deg, rgba(255,255,255,.35) 0 1px, transparent 1px 3px), #c43d70; }

.map .legend { margin-top: 8px; line-height: 1.7; display: flex; flex-wrap: wrap; gap: 0 14px; }
.map .swatch { display: inline-block; width: 13px; height: 13px; border-radius: 2px; vertical-align: -2px; margin-right: 5px; }

/* Controls. */
.map .panel { margin-top: 12px; padding: 10px 12px; border: 1px solid var(--line); border-radius: 8px; background: var(--card); display: grid; gap: 8px; }
.map .panel:focus:not(:focus-visible) { outline: none; }
.map .contents { display: contents; }
.map .panel > :empty, .map .contents > :empty { display: none; }
.map .selection-row { display: flex; flex-wrap: wrap; gap: 6px 12px; align-items: center; min-height: 28px; }
.map .buttons, .map .controls { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
.map .spring { flex: 1 1 auto; }
.map .policies { display: inline-flex; gap: 6px; align-items: center; }
.map select { font: inherit; color: var(--text); background: var(--page); border: 1px solid var(--muted); border-radius: 6px; min-height: 28px; padding: 2px 4px; }
.map .controls button { min-height: 28px; }
.map .controls .primary { padding: 2px 18px; }
.map .copy { position: relative; }
.map .menu {
  position: absolute; right: 0; bottom: calc(100% + 4px); z-index: 9; display: grid; min-width: 170px; padding: 4px; border: 1px solid var(--muted);
  border-radius: 8px; background: var(--page); box-shadow: 0 4px 16px rgba(0, 0, 0, .3);
}
.map .menu button { white-space: nowrap; border: 0; background: none; text-align: left; padding: 5px 10px; }
.map .status { font-weight: 600; }
.map .outcome.is-old { opacity: .6; }
.map .results { display: flex; flex-wrap: wrap; }
.map .up { color: var(--text); font-weight: 600; }
.map .down { color: var(--bad-text); font-weight: 600; }
.map .job { display: flex; gap: 12px; align-items: center; }
.map .job-bar { flex: 1 1 auto; min-width: 0; }
.map textarea { width: 100%; font: 12px/1.4 var(--mono); color: var(--text); background: var(--page); border: 1px solid var(--muted); border-radius: 6px; padding: 6px; }
.map code { font-family: var(--mono); overflow-wrap: anywhere; }

/* The kernel or the model is gone. */
.map.is-lost .tiers, .map.is-lost .strip .blocks { filter: grayscale(.85); }

@container (max-width: 640px) {
  .map .row { grid-template-columns: minmax(0, 1fr) auto; gap: 2px 8px; }
  .map .row > .field { grid-column: 1 / -1; grid-row: 2; padding-right: 16px; }
  .map .budget > :first-child { text-align: left; }
  .map .link > :not(.field), .map .scale-row > :not(.field) { display: none; }
  .map .scale-row .track span:nth-child(even) { display: none; }
  .map .tier { padding: 4px 8px; }
  .map .strip .blocks { grid-template-columns: repeat(var(--narrow), minmax(0, 1fr)); }
  .map .spring { display: none; }
}
@media (forced-colors: active) {
  .map input[type="range"] { appearance: auto; }
  .map .block { border: 1px solid CanvasText; }
  .map .block.selected { outline: 3px solid Highlight; outline-offset: -3px; }
  .map .lane, .map .meter i, .map .swatch, .map .beyond-end { forced-color-adjust: none; }
  .map .tip, .map .ghost { background: Canvas; color: CanvasText; border: 1px solid CanvasText; }
}
`
