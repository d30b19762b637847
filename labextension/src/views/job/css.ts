/** Looks of a job at work. */

import { HEAD_CSS } from '../head_css'

export const JOB_CSS = `${HEAD_CSS}
.job-time { white-space: nowrap; }
.job-foot { display: flex; flex-wrap: wrap; gap: 0 16px; min-height: 1.5em; font-size: 12px; }
.job-now { overflow-wrap: anywhere; }
.job-tiers { margin-top: 8px; display: grid; gap: 6px; }
.job-line { display: flex; flex-wrap: wrap; gap: 0 12px; font-size: 12px; }
.job-name { overflow-wrap: anywhere; }
.job-count { margin-left: auto; }
.job-bar { display: flex; width: var(--width); min-width: 4px; height: 20px; border-radius: 3px; overflow: hidden; }
.job-cell { flex: var(--bytes) 1 0; min-width: 1px; position: relative; background: color-mix(in srgb, var(--muted) 24%, transparent); }
.job-cell:not(:last-child) { border-right: 1px solid var(--page); }
.job-cell > span { position: absolute; inset: 0; transform: scaleY(0); transform-origin: bottom; transition: transform .3s ease-out; }
.job-cell.done > span { transform: none; }
.job-cell.now > span { transform: scaleY(.5); animation: job-fill 1.2s ease-in-out infinite alternate; }
.job-cell.now { box-shadow: inset 0 0 0 1px var(--text); }
@keyframes job-fill { from { transform: scaleY(.2); } to { transform: scaleY(.85); } }
@media (forced-colors: active) {
  .job-cell { forced-color-adjust: none; background: Canvas; outline: 1px solid CanvasText; }
}
`
