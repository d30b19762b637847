/** What a proposal would mean: whether it fits, how fast before and after, what Apply would move. */

import { h, replace } from '../../dom'
import type { Translate } from '../../i18n'
import { formatBytes, formatNumber, formatPercent, formatRate, formatSeconds } from '../../units'
import type { FailedEvent, PlanState } from '../../wire'
import type { Editor, Step } from './editor'
import { verdict } from '../map/words'

export interface Outcome {
  element: HTMLElement
  show: (editor: Editor) => void
}

export function makeOutcome(t: Translate): Outcome {
  const details = h('div', { class: 'outcome' })
  const alert = h('div', { role: 'alert' })
  let alerted: FailedEvent | null = null
  return {
    element: h('div', { class: 'contents' }, alert, details),
    show(editor) {
      const { step, state } = editor
      const failure = editor.failure ?? step?.failure ?? null
      if (failure !== alerted) replace(alert, ...(failure ? [failed(failure)] : []))
      alerted = failure
      const answer = step?.answer
      details.classList.toggle('is-old', editor.isWaiting)
      replace(details, ...(answer ? answered(t, state.plan, answer.plan) : []))
    },
  }
}

/** One sentence about what is going on, for the status line. */
export function statusWords(t: Translate, editor: Editor): string {
  const { applied, step, isApplying } = editor
  if (applied) {
    const word = applied.changed === 1 ? 'editAppliedOne' : 'editApplied'
    return t(word, { count: formatNumber(applied.changed), time: formatSeconds(applied.seconds) })
  }
  if (isApplying) return t('editApplying')
  return step?.answer ? answerWords(t, editor, step) : ''
}

function answerWords(t: Translate, editor: Editor, { answer }: Step): string {
  if (!answer) return ''
  const isPlanned = editor.state.status === 'planned'
  if (!answer.changed) return t(isPlanned ? 'editSamePlan' : 'editNothingMoves')
  const words = { count: formatNumber(answer.changed), size: formatBytes(answer.moved_bytes) }
  if (answer.changed === 1) return t(isPlanned ? 'editWouldDifferOne' : 'editWouldMoveOne', words)
  return t(isPlanned ? 'editWouldDiffer' : 'editWouldMove', words)
}

function failed({ message, next_step: nextStep }: FailedEvent): HTMLElement {
  return h('div', { class: 'note bad' }, h('div', {}, `✗ ${message}`), nextStep ? h('div', {}, `→ ${nextStep}`) : null)
}

function answered(t: Translate, before: PlanState, after: PlanState): HTMLElement[] {
  return [
    h('div', { class: 'results' },
      h('span', { class: `chip ${after.fits ? 'good' : 'bad'}` }, verdict(t, after)),
      speed(t('editDecode'), before.decode_tps, after.decode_tps),
      speed(t('editPrefill'), before.prefill_tps, after.prefill_tps)),
    ...after.problems.map(text => h('p', { class: 'note bad' }, `✗ ${text}`)),
    ...after.remedies.slice(0, 1).map(text => h('p', { class: 'note' }, `→ ${text}`)),
    ...warnings(t, before, after),
  ]
}

/** `decode 0.51 → 0.62 tok/s  +22 %`. */
function speed(name: string, before: number, after: number): HTMLElement {
  const change = before > 0 && after > 0 ? after / before - 1 : 0
  const sign = change > 0 ? '▲ +' : '▼ −'
  const words = Math.abs(change) >= 0.005 ? `${sign}${formatPercent(Math.abs(change))}` : ''
  return h(
    'span', { class: 'chip num' }, `${name} `, h('span', { class: 'muted' }, `${before ? formatRate(before) : '?'} → `),
    h('b', {}, after ? formatRate(after) : '?'), words && h('span', { class: change > 0 ? 'up' : 'down' }, ` ${words}`),
  )
}

/** What is to know now, and was not before; and what is not so any more. */
function warnings(t: Translate, before: PlanState, after: PlanState): HTMLElement[] {
  const isNew = (text: string) => !before.warnings.includes(text)
  const gone = before.warnings.filter(text => !after.warnings.includes(text))
  return [
    ...after.warnings.map(text => h('p', { class: 'note care' }, isNew(text) && h('b', {}, `${t('editNew')} `), `! ${text}`)),
    ...gone.map(text => h('p', { class: 'note muted' }, h('b', {}, `${t('editGone')} `), h('s', {}, text))),
  ]
}
