/**
 * Colours, patterns and basic elements that all views share, as one style sheet of a shadow root.
 *
 * The same palette as `llm_magic/views/theme.py`: every fill has a contrast of 3:1 or more against white
 * and black-ish backgrounds, and 4.5:1 under white text. What must differ comes from the host's variables
 * (JupyterLab, VS Code), or from the system's colour scheme where there are none.
 */

/** What a filled area stands for; its class is `fill-NAME`. */
export const FILLS = [
  'gpu', 'split', 'ram', 'ram-streamed', 'looked-up', 'disk', 'kept', 'idle', 'draft', 'kv_cache', 'activations', 'slots',
  'buffers', 'reserve', 'other', 'free',
] as const
export type Fill = (typeof FILLS)[number]

const VEIL = 'rgba(255,255,255,.26)'
const DIAGONAL = `repeating-linear-gradient(45deg,${VEIL} 0 3px,transparent 3px 8px)`
const FLAT = `repeating-linear-gradient(0deg,${VEIL} 0 2px,transparent 2px 6px)`
const UPRIGHT = `repeating-linear-gradient(90deg,${VEIL} 0 2px,transparent 2px 6px)`
const DOTS = `radial-gradient(${VEIL} 1.2px,transparent 1.7px) 0 0/6px 6px`
const GRID = [0, 90].map(angle => `repeating-linear-gradient(${angle}deg,${VEIL} 0 1px,transparent 1px 7px)`).join()
const BACK = `repeating-linear-gradient(135deg,${VEIL} 0 2px,transparent 2px 5px)`

export const BASE_CSS = `
:host { all: initial; display: block; color-scheme: light dark; }
:host([hidden]) { display: none; }
.llm {
  --text: var(--jp-ui-font-color1, var(--vscode-editor-foreground, light-dark(#1f2328, #e6e9ee)));
  --muted: var(--jp-ui-font-color2, var(--vscode-descriptionForeground, light-dark(#5b6673, #9aa5b1)));
  --line: var(--jp-border-color2, var(--vscode-panel-border, light-dark(#d3d9e0, #353c45)));
  --page: var(--jp-layout-color0, var(--vscode-editor-background, light-dark(#ffffff, #111418)));
  --card: var(--jp-layout-color1, var(--vscode-editorWidget-background, light-dark(#f6f7f9, #191d23)));
  --hover: var(--jp-layout-color2, var(--vscode-list-hoverBackground, light-dark(#eceff2, #262b32)));
  --accent: var(--jp-brand-color1, var(--vscode-focusBorder, light-dark(#1967d2, #7ab7ff)));
  --bad-text: color-mix(in srgb, #d1242f 70%, var(--text)); /* a host's red may be too dark on its black */
  --mono: var(--jp-code-font-family, ui-monospace, SFMono-Regular, Menlo, Consolas, monospace);
  --good: #1a7f5a; --bad: #d1242f; --care: #a8680e;
  --tier-gpu: #1a7f5a; --tier-ram: #2f6fd6; --tier-disk: #a8680e; --tier-npu: #5f6b78;
  box-sizing: border-box; max-width: 1040px; padding: 12px 14px; border-radius: 6px;
  background: var(--page); color: var(--text); text-align: left;
  font: 13px/1.45 var(--jp-ui-font-family, system-ui, sans-serif);
}
.llm *, .llm *::before, .llm *::after { box-sizing: border-box; }
.llm [hidden] { display: none !important; }
.llm .muted { color: var(--muted); }
.llm .num { font-variant-numeric: tabular-nums; }
.llm .visually-hidden {
  position: absolute; width: 1px; height: 1px; margin: -1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap;
}
.llm button {
  font: inherit; color: var(--text); background: var(--card); border: 1px solid var(--muted); border-radius: 6px;
  padding: 2px 10px; min-height: 26px; cursor: pointer;
}
.llm button:hover:not(:disabled) { background: var(--hover); }
.llm button:disabled { opacity: .55; cursor: default; }
.llm button.primary { background: #1a66c2; border-color: #1a66c2; color: #fff; font-weight: 600; }
.llm button.primary:hover:not(:disabled) { background: #14549f; }
.llm :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.llm .chip {
  display: inline-block; border: 1px solid var(--line); border-radius: 999px; padding: 1px 10px; margin: 0 6px 4px 0;
  background: var(--card);
}
.llm .chip.good { border-color: var(--good); font-weight: 600; }
.llm .chip.bad { border-color: var(--bad); font-weight: 600; }
.llm .note { margin: 3px 0; padding-left: 8px; border-left: 3px solid var(--line); }
.llm .note.bad { border-left-color: var(--bad); }
.llm .note.care { border-left-color: var(--care); }
.llm .lost {
  margin: 0 0 8px; padding: 6px 10px; border: 1px solid var(--care); border-left-width: 4px; border-radius: 6px; background: var(--card);
}
.llm .pb {
  position: relative; height: 8px; margin: 6px 0 8px; overflow: hidden; border-radius: 4px;
  background: color-mix(in srgb, var(--muted) 26%, transparent);
}
.llm .pb-done { height: 100%; width: var(--share); background: var(--accent); border-radius: inherit; transition: width .25s ease-out; }
.llm .pb.ticks {
  border-radius: 2px;
  -webkit-mask: repeating-linear-gradient(90deg, #000 0 calc(100% / var(--ticks) - 2px), transparent 0 calc(100% / var(--ticks)));
  mask: repeating-linear-gradient(90deg, #000 0 calc(100% / var(--ticks) - 2px), transparent 0 calc(100% / var(--ticks)));
}
.llm .pb.ticks .pb-done { border-radius: 0; }
.llm .pb.unknown .pb-done { width: 28%; animation: pb-wander 1.8s ease-in-out infinite alternate; }
@keyframes pb-wander { from { margin-left: 0; } to { margin-left: 72%; } }
.fill-gpu { background: #1a7f5a; }
.fill-split { background: ${DIAGONAL}, #1a7f5a; }
.fill-ram { background: #2f6fd6; }
.fill-ram-streamed { background: ${DIAGONAL}, #2f6fd6; }
.fill-looked-up { background: ${GRID}, #2f6fd6; }
.fill-disk { background: ${FLAT}, #a8680e; }
.fill-kept { background: ${BACK}, #a8680e; }
.fill-idle { background: #6a7280; }
.fill-draft { background: ${DOTS}, #1a7f5a; }
.fill-kv_cache { background: ${DOTS}, #7c4ddb; }
.fill-activations { background: ${UPRIGHT}, #c43d70; }
.fill-slots { background: ${DIAGONAL}, #0b7f97; }
.fill-buffers { background: ${UPRIGHT}, #5f6b78; }
.fill-reserve { background: repeating-linear-gradient(45deg,rgba(128,137,147,.38) 0 2px,transparent 2px 8px); }
.fill-other { background: repeating-linear-gradient(135deg,rgba(128,137,147,.75) 0 2px,transparent 2px 6px); }
.fill-free { background: transparent; }
@media (forced-colors: active) {
  .llm [class*="fill-"], .llm .pb { forced-color-adjust: none; }
  .llm .pb { background: Canvas; outline: 1px solid CanvasText; }
  .llm .pb-done { background: Highlight; }
}
@media (prefers-reduced-motion: reduce) {
  .llm *, .llm *::before, .llm *::after { animation: none !important; transition: none !important; }
  /* How far it is nobody knows: stripes all along, which no share looks like. */
  .llm .pb.unknown .pb-done {
    width: 100%; opacity: .6; background: repeating-linear-gradient(45deg, var(--accent) 0 4px, transparent 4px 10px);
  }
}
`
