/** The top of the map: the model's name, its facts, and chips with verdict, placement and speed. */

import { h, replace, setText } from '../../dom'
import type { Translate } from '../../i18n'
import { formatPercent, formatRate } from '../../units'
import type { MapState, PlanState } from '../../wire'
import type { Editor } from '../editor/editor'
import { boundWords } from '../bound'
import { headline, placementWords, verdict } from './words'

const SWEEP_WORTH_SAYING = 1.05 // tokens per sweep; with less, nothing was speculated

export interface Head {
  element: HTMLElement
  show: (editor: Editor) => void
}

export function makeHead(t: Translate): Head {
  const name = h('strong', { class: 'model' })
  const facts = h('span', { class: 'muted facts' })
  const chips = h('div', { class: 'chips' })
  const notes = h('div', { class: 'notes' })
  const element = h('div', {}, h('div', { class: 'title' }, name, facts), chips, notes)
  return {
    element,
    show(editor) {
      const { plan, step } = editor
      setText(name, plan.name)
      setText(facts, headline(t, plan))
      replace(chips, ...(step ? proposalChips(t, editor) : chipsInForce(t, editor.state)))
      // What a proposal means is said below, beside Apply.
      replace(notes, ...(step ? [] : makeNotes(plan)))
    },
  }
}

/** Of a proposal there is nothing to say before Python has said it, and nothing when it was refused. */
function proposalChips(t: Translate, { plan, isKnown, isWaiting }: Editor): HTMLElement[] {
  const proposed = chip(t('editProposed'), 'proposed')
  if (isKnown) return [proposed, ...planChips(t, plan)]
  return isWaiting ? [proposed, chip(t('editAsking'))] : [proposed]
}

function chipsInForce(t: Translate, state: MapState): HTMLElement[] {
  return [...planChips(t, state.plan), ...measured(t, state).filter(Boolean).map(text => chip(text))]
}

function planChips(t: Translate, plan: PlanState): HTMLElement[] {
  return [
    chip(verdict(t, plan), plan.fits ? 'good' : 'bad'),
    ...[placementWords(t, plan), ...forecast(t, plan)].filter(Boolean).map(text => chip(text)),
  ]
}

function forecast(t: Translate, plan: PlanState): string[] {
  if (!plan.decode_tps) return [t('mapForecastUnknown')]
  const prefill = plan.prefill_tps ? [t('mapPrefill', { rate: formatRate(plan.prefill_tps) })] : []
  return [
    [t('mapForecast', { rate: formatRate(plan.decode_tps) }), ...prefill].join(' · '),
    plan.bound_by ? t('mapBoundBy', { what: boundWords(t, plan.bound_by) }) : '',
  ]
}

function measured(t: Translate, state: MapState): string[] {
  if (!state.measured_tps) return []
  const { limit_share: limit, tokens_per_sweep: tokens } = state
  return [
    [
      t('mapMeasured', { rate: formatRate(state.measured_tps) }),
      ...(limit ? [t('mapOfLimit', { percent: formatPercent(limit) })] : []),
    ].join(' · '),
    tokens > SWEEP_WORTH_SAYING ? t('mapTokensPerSweep', { count: tokens.toFixed(1) }) : '',
  ]
}

function chip(text: string, kind = ''): HTMLElement {
  return h('span', { class: `chip num ${kind}` }, text)
}

/** What is wrong, and the first thing to do about it. What else is to know stands above the map, in the notebook. */
function makeNotes(plan: PlanState): HTMLElement[] {
  return [
    ...plan.problems.map(text => h('p', { class: 'note bad' }, `✗ ${text}`)),
    ...plan.remedies.slice(0, 1).map(text => h('p', { class: 'note' }, `→ ${text}`)),
  ]
}
