/** The numbers of an answer: tokens, speed, and what bounds it. */

import { h } from '../../dom'
import type { Translate } from '../../i18n'
import { formatNumber, formatRate, formatSeconds } from '../../units'
import type { AnswerEvent } from '../../wire'
import { boundWords } from '../bound'

// Below this, one sweep makes one token and needs no words.
const ONE_TOKEN = 1.05

/** `142 tokens`, `9.8 tok/s`, …: what is known by now, in the order of its weight. */
export function figures(event: AnswerEvent | null, boundBy: string, t: Translate): string[] {
  const bound = boundBy && boundBy !== 'unknown' ? [t('answerBoundBy', { what: boundWords(t, boundBy) })] : []
  return event ? [...measured(event, t), ...bound] : bound
}

/** Figures as elements that wrap between two of them, never inside of one. */
export function figureElements(texts: string[]): HTMLElement[] {
  return texts.map(text => h('span', { class: 'figure num' }, text))
}

function measured(event: AnswerEvent, t: Translate): string[] {
  const texts: string[] = []
  if (event.tokens) texts.push(tokensWords(event.tokens, t))
  if (event.generation_tps) texts.push(formatRate(event.generation_tps))
  if (event.tokens_per_sweep > ONE_TOKEN) texts.push(t('answerPerSweep', { count: event.tokens_per_sweep.toFixed(1) }))
  if (event.first_token_s) texts.push(t('answerFirstToken', { time: formatSeconds(event.first_token_s) }))
  return texts
}

function tokensWords(count: number, t: Translate): string {
  return count === 1 ? t('answerToken') : t('answerTokens', { count: formatNumber(count) })
}
