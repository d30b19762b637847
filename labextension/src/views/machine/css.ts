/** Looks of the machine picture. The tiers have the colours of `theme.ts`. */

export const MACHINE_CSS = `
.mv { --lit: var(--accent); --slow: var(--bad-text); position: relative; }
.mv-head { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 12px; margin-bottom: 8px; }
.mv-title { flex: 1 1 220px; overflow-wrap: anywhere; }
.mv-title b { font-size: 15px; margin-right: 6px; }
.llm .mv-toggle[aria-pressed="true"] { background: var(--text); border-color: var(--text); color: var(--page); font-weight: 600; }
.llm .mv-toggle[aria-pressed="true"]:hover { background: var(--text); }
.mv-body { display: flex; flex-wrap: wrap; gap: 14px 24px; align-items: flex-start; }
.mv-picture { flex: 1 1 400px; min-width: 0; }
.mv-svg { display: block; max-width: 100%; height: auto; overflow: visible; font-size: 12px; }
.mv-svg text { fill: var(--text); font-family: inherit; }
.mv-svg .mv-id { font: 600 14px/1 var(--mono); }
.mv-svg .mv-muted, .mv-svg .hollow .mv-on-die.mv-on-die { fill: color-mix(in srgb, var(--text) 74%, var(--page)); }
.mv-svg .mv-small { font-size: 11px; }
.mv-svg .mv-tight { font-size: 11px; }
.mv-svg .mv-strong { font-weight: 600; }
.mv-svg .mv-num { font-variant-numeric: tabular-nums; }
.mv-svg .mv-mid { text-anchor: middle; }
.mv-svg .mv-end { text-anchor: end; }
.mv-svg .mv-halo { paint-order: stroke; stroke: var(--page); stroke-width: 4px; stroke-linejoin: round; }
.tier-gpu, .kind-gpu { --tier: var(--tier-gpu); }
.tier-cpu, .kind-cpu, .kind-unified { --tier: var(--tier-ram); }
.tier-disk, .kind-disk { --tier: var(--tier-disk); }
.tier-npu, .kind-npu { --tier: #5f6b78; }
.mv-card { fill: var(--card); fill: color-mix(in srgb, var(--tier) 9%, var(--page)); stroke: var(--tier); stroke-opacity: .55; stroke-width: 1.2; }
.kind-npu .mv-card { stroke-dasharray: 4 3; fill: none; }
.mv-box { fill: var(--page); stroke: var(--tier); stroke-opacity: .6; }
.mv-die rect { fill: var(--tier); }
.mv-pins { stroke: var(--tier); stroke-width: 3; opacity: .5; }
.mv-svg .mv-on-die { fill: #fff; }
.mv-die.hollow rect { fill: var(--page); stroke: var(--muted); stroke-dasharray: 4 3; }
.mv-die.hollow .mv-pins { opacity: 0; }
.mv-free { fill: color-mix(in srgb, var(--muted) 22%, transparent); }
.mv-used { fill: var(--tier); }
.mv-hatch { stroke: var(--muted); stroke-width: 2; fill: none; }
.mv-line { fill: none; stroke: color-mix(in srgb, var(--muted) 55%, var(--page)); stroke-linejoin: round; }
.way.assumed .mv-line { stroke-dasharray: 9 3; }
.mv-near { fill: none; stroke: transparent; stroke-width: 16; pointer-events: stroke; }
.mv-lit { fill: none; stroke: var(--lit); stroke-width: 3.5; stroke-linejoin: round; }
.mv-dots {
  fill: none; stroke: var(--lit); stroke-width: 9; stroke-linecap: round; stroke-dasharray: .1 17.9;
  animation: mv-run var(--pace, 1s) linear infinite;
}
.mv.still .mv-dots { display: none; }
@keyframes mv-run { from { stroke-dashoffset: 18; } to { stroke-dashoffset: 0; } }
.mv-arrow { fill: var(--lit); stroke: var(--page); stroke-width: 1; }
.mv-svg .mv-step text { fill: var(--lit); font-weight: 600; }
.mv-pill rect { fill: var(--lit); }
.mv-svg .mv-step .mv-pill text { fill: var(--page); font-size: 11px; font-weight: 700; }
.limiting { --lit: var(--slow); }
.mv:not(.lit) .mv-flow, .mv:not(.lit) .mv-step { display: none; }
.mv-thing { outline: none; }
.mv-thing:hover > .mv-card, .mv-thing:focus-visible > .mv-card { stroke-opacity: 1; stroke-width: 2; }
.mv-thing:hover > .mv-line { stroke: var(--muted); }
.llm .mv-thing:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; border-radius: 8px; }
.mv-tip {
  position: absolute; z-index: 2; max-width: min(320px, 100%); padding: 6px 10px; border: 1px solid var(--muted); border-radius: 6px;
  background: var(--page); box-shadow: 0 3px 14px rgba(0,0,0,.3); font-size: 12px; pointer-events: none; overflow-wrap: anywhere;
}
.mv-tip div:first-child { font-weight: 600; }
.mv-steps { flex: 1 1 250px; min-width: 0; }
.mv-steps h3 { margin: 0 0 6px; font-size: 13px; }
.mv-steps ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 7px; }
.mv.many .mv-picture, .mv.many .mv-steps { flex-basis: 100%; }
.mv.many .mv-steps ol { grid-template-columns: repeat(auto-fill, minmax(min(280px, 100%), 1fr)); column-gap: 24px; }
.mv-steps li { display: grid; grid-template-columns: 29px minmax(0, 1fr); }
.mv-number {
  align-self: start; justify-self: start; min-width: 18px; padding: 0 4px; border-radius: 9px; background: var(--accent); color: var(--page);
  font-size: 11px; font-weight: 700; line-height: 18px; text-align: center;
}
.limiting > .mv-number { background: var(--slow); }
.mv-time { grid-column: 2; height: 6px; margin-top: 2px; border-radius: 3px; background: color-mix(in srgb, var(--muted) 22%, transparent); }
.mv-time > div { height: 100%; width: var(--share); min-width: 2px; border-radius: 3px; background: var(--accent); }
.limiting > .mv-time > div { background: var(--slow); }
.limiting > .mv-words { font-weight: 600; }
.mv-sums { display: grid; grid-template-columns: auto minmax(0, 1fr); gap: 2px 10px; margin: 12px 0 0; padding-top: 8px; border-top: 1px solid var(--line); }
.mv-sums dt { color: var(--muted); }
.mv-sums dd { margin: 0; overflow-wrap: anywhere; }
.mv-legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 10px 0 6px; font-size: 12px; color: var(--muted); }
.mv-swatch { display: inline-block; width: 20px; height: 10px; margin-right: 6px; border-radius: 2px; vertical-align: -1px; border: 1px solid var(--muted); }
.mv-swatch.used { background: var(--muted); }
.mv-swatch.rope { height: 0; border: 0; border-radius: 0; border-top: 2px solid var(--muted); border-bottom: 0; vertical-align: 4px; box-shadow: 0 5px 0 1px var(--muted); }
.mv-notes { font-size: 12px; }
.mv-table { margin-top: 6px; }
.mv-table summary { cursor: pointer; width: fit-content; }
.mv-scroll { overflow-x: auto; }
.mv-table table { border-collapse: collapse; margin: 8px 0; font-size: 12px; }
.mv-table caption { text-align: left; font-weight: 600; padding: 2px 0; }
.mv-table th, .mv-table td { text-align: left; vertical-align: top; padding: 2px 14px 2px 0; border-bottom: 1px solid var(--line); }
.mv-table th { color: var(--muted); font-weight: 400; }
.mv-table tbody th { color: var(--text); font-family: var(--mono); }
@media (forced-colors: active) {
  .mv { --accent: Highlight; --lit: Highlight; --slow: LinkText; --page: Canvas; --card: Canvas; --muted: CanvasText; --text: CanvasText; }
  .mv-svg, .mv-number, .mv-time, .mv-time > div, .mv-swatch, .mv-toggle { forced-color-adjust: none; }
}
`
