/** Where an answer or a job is, in words and as a bar: the same in every view. */

import { h } from '../dom'
import type { Translate, Word } from '../i18n'
import { formatBytes, formatNumber } from '../units'
import type { ProgressEvent } from '../wire'

/** What answers and jobs both say about where they are. */
export type Phase = Pick<ProgressEvent, 'phase' | 'done' | 'total' | 'unit'>

const PHASES: Record<NonNullable<Phase['phase']>, Word> = {
  importing: 'phaseImporting',
  reading: 'phaseReading',
  planning: 'phasePlanning',
  downloading: 'phaseDownloading',
  loading: 'phaseLoading',
  converting: 'phaseConverting',
  quantizing: 'phaseQuantizing',
  'warming up': 'phaseWarmingUp',
  moving: 'phaseMoving',
  measuring: 'phaseMeasuring',
  prefill: 'phasePrefill',
  generating: 'phaseGenerating',
}
const UNITS = new Map<string, Word>([
  ['layers', 'phaseLayers'],
  ['tensors', 'phaseTensors'],
  ['blocks', 'phaseBlocks'],
  ['sweeps', 'phaseSweeps'],
])
// More ticks than this are a blur: a plain bar says the same.
const TICKS_AT_MOST = 80

/** `reading the prompt`. A phase of a newer kernel is shown by its own name. */
export function phaseName(phase: Phase | null, t: Translate): string {
  if (!phase?.phase) return t('phaseStarting')
  return Object.hasOwn(PHASES, phase.phase) ? t(PHASES[phase.phase]) : String(phase.phase)
}

/** `12 of 30 layers`; empty where nothing is counted. */
export function phaseAmount(phase: Phase | null, t: Translate): string {
  if (!phase) return ''
  const isBytes = phase.unit === 'bytes'
  const amount = (count: number) => (isBytes ? formatBytes(count) : formatNumber(count))
  if (!phase.total) return phase.done && isBytes ? t('phaseSoFar', { done: amount(phase.done) }) : ''
  const values = { done: amount(phase.done), total: amount(phase.total) }
  return isBytes ? t('phaseBytes', values) : t('phaseAmount', { ...values, unit: unitWords(phase.unit, t) })
}

/** `reading the prompt, 12 of 30 layers`. */
export function phaseWords(phase: Phase | null, t: Translate): string {
  const name = phaseName(phase, t)
  const amount = phase?.phase ? phaseAmount(phase, t) : ''
  return amount ? t('phaseWith', { phase: name, amount }) : name
}

/** A bar that may have a tick for every unit. */
export class PhaseBar {
  readonly element: HTMLElement
  private readonly done = h('div', { class: 'pb-done' })

  constructor(private readonly t: Translate) {
    this.element = h('div', { class: 'pb', role: 'progressbar', 'aria-label': t('phaseProgress') }, this.done)
    this.show(null)
  }

  /** Without a share that is done the bar moves to and fro, and says no value. */
  show(phase: Phase | null, words = phaseWords(phase, this.t)): void {
    const share = shareDone(phase)
    const hasTicks = phase !== null && phase.unit !== 'bytes' && phase.total > 1 && phase.total <= TICKS_AT_MOST
    this.element.classList.toggle('ticks', hasTicks)
    this.element.classList.toggle('unknown', share === null)
    this.element.style.setProperty('--ticks', String(hasTicks ? phase.total : 1))
    this.element.style.setProperty('--share', `${((share ?? 0) * 100).toFixed(2)}%`)
    this.element.setAttribute('aria-valuetext', words)
    if (share === null) for (const name of ['now', 'min', 'max']) this.element.removeAttribute(`aria-value${name}`)
    else this.setValue(Math.round(share * 100))
  }

  private setValue(percent: number): void {
    this.element.setAttribute('aria-valuemin', '0')
    this.element.setAttribute('aria-valuemax', '100')
    this.element.setAttribute('aria-valuenow', String(percent))
  }
}

/** Share that is done, from 0 to 1; `null` where nobody can tell. */
function shareDone(phase: Phase | null): number | null {
  if (!phase?.total) return null
  return Math.min(1, Math.max(0, phase.done / phase.total))
}

function unitWords(unit: string, t: Translate): string {
  const word = UNITS.get(unit)
  return word ? t(word) : unit
}
