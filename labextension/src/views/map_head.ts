/** The top of the map: the model's name, its facts, and chips with verdict, placement and speed. */

import { h, replace, setText } from '../dom'
import type { Translate } from '../i18n'
import { formatRate } from '../units'
import type { MapState, PlanState } from '../wire'
import { headline, placementWords, verdict } from './map_words'

const SWEEP_WORTH_SAYING = 1.05 // tokens per sweep; with less, nothing was speculated

export interface Head {
  element: HTMLElement
  show: (state: MapState, plan: PlanState, isProposal: boolean, isGuess: boolean) => void
}

export function makeHead(t: Translate): Head {
  const name = h('strong', { class: 'model' })
  const facts = h('span', { class: 'muted facts' })
  const chips = h('div', { class: 'chips' })
  const notes = h('div', { class: 'notes' })
  const element = h('div', {}, h('div', { class: 'title' }, name, facts), chips, notes)
  return {
    element,
    show(state, plan, isProposal, isGuess) {
      setText(name, plan.name)
      setText(facts, headline(t, plan))
      replace(chips, ...makeChips(t, state, plan, isProposal, isGuess))
      // What a proposal means is said below, beside Apply.
      replace(notes, ...(isProposal ? [] : makeNotes(plan)))
    },
  }
}

function makeChips(
  t: Translate, state: MapState, plan: PlanState, isProposal: boolean, isGuess: boolean,
): HTMLElement[] {
  if (isGuess) return [chip(t('editProposed'), 'proposed'), chip(t('editAsking'))]
  const words = isProposal ? forecast(t, plan) : [...forecast(t, plan), ...measured(t, state)]
  return [
    ...(isProposal ? [chip(t('editProposed'), 'proposed')] : []),
    chip(verdict(t, plan), plan.fits ? 'good' : 'bad'),
    ...[placementWords(t, plan), ...words].filter(Boolean).map(text => chip(text)),
  ]
}

function forecast(t: Translate, plan: PlanState): string[] {
  if (!plan.decode_tps) return [t('mapForecastUnknown')]
  const prefill = plan.prefill_tps ? [t('mapPrefill', { rate: formatRate(plan.prefill_tps) })] : []
  return [
    [t('mapForecast', { rate: formatRate(plan.decode_tps) }), ...prefill].join(' · '),
    plan.bound_by ? t('mapBoundBy', { what: plan.bound_by }) : '',
  ]
}

function measured(t: Translate, state: MapState): string[] {
  if (!state.measured_tps) return []
  const { limit_share: limit, tokens_per_sweep: tokens } = state
  return [
    [
      t('mapMeasured', { rate: formatRate(state.measured_tps) }),
      ...(limit ? [t('mapOfLimit', { percent: (100 * limit).toFixed(0) })] : []),
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
